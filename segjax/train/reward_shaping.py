"""Computes one reward per token from the scores of a rollout, before the clip and the KL penalty.

Applies functions of `rl` in this order: normalise or redistribute, credit, spread, mix with other
rewards, penalise. Clip and KL penalty follow in `rl.rewards.shaped_reward`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import RewardShaping
from segjax.rl.lm_rewards import pool, token_reward
from segjax.rl.normalizer import normalize
from segjax.rl.redistribution import by_attention
from segjax.rl.rewards import end_penalty, length_penalty, red
from segjax.rl.spreads import dense_reward, min_credit
from segjax.train.compat import padded_length_threshold
from segjax.train.recipe import PPORecipe
from segjax.train.scoring import ModelOutputs
from segjax.types import Normalizer, Rollout, Segments


def segment_z(
  outputs: ModelOutputs,
  segments: Segments,
  rollout: Rollout,
  normalizer: Normalizer,
  shaping: RewardShaping,
) -> Float[Array, 'B T']:
  """Returns z, the normalised score of each segment, read at its last token.

  z = (score - Mean(p)) / Std(p). With a redistribution, z is the part of a segment in the
  normalised score of its response.
  """
  if shaping.redistribute == 'none':
    floor = resolve_std_floor_ratio(shaping)
    return jax.vmap(functools.partial(normalize, normalizer=normalizer, std_floor_ratio=floor))(
      outputs.score, segments
    )
  # Mean and Std of p = 1 at every position: only then do the parts add up to the score.
  mean, std = normalizer.b_mean, jnp.maximum(normalizer.b_std, 1e-6)
  score, mask = (outputs.score - mean) / std, rollout.response_mask
  if shaping.redistribute == 'red':
    before = (outputs.prompt_score - mean) / std
    difference = functools.partial(red, baseline=shaping.red_baseline)
    return jax.vmap(difference)(score, before, segments, mask)
  part = jnp.where(mask, outputs.attribution, 0) / std
  if shaping.redistribute == 'attention':
    share_out = functools.partial(by_attention, share=shaping.attention_share)
    part = jax.vmap(share_out)(outputs.attribution, score, mask)
  return jax.vmap(pool)(part, segments)


def dense_rewards(
  z: Float[Array, 'B T'],
  segments: Segments,
  rollout: Rollout,
  ref_entropy: Float[Array, 'B T'],
  custom_reward: Float[Array, 'B T'] | None,
  lm_reward: Float[Array, 'B T'] | None = None,
  *,
  recipe: PPORecipe,
) -> Float[Array, 'B T']:
  """Returns the reward of each token, before the clip and the KL penalty.

  dense = reward_model_weight · spread(credit(z)) + reward_fn_weight · custom_reward + lm_reward,
  then the penalties for missing EOS and for length.

  Args:
    z: `segment_z`.
    segments: the segments.
    rollout: the responses.
    ref_entropy: entropy of the reference, nats.
    custom_reward: the user's reward of each token, if there is one.
    lm_reward: `lm_rewards`, if a language model rewards tokens.
    recipe: weights, credit, spread and penalties.
  """
  shaping = recipe.shaping
  if shaping.credit == 'min':
    weigh = functools.partial(min_credit, temperature=shaping.credit_temperature)
    z = jax.vmap(weigh)(z, segments)
  dense = shaping.reward_model_weight * _spread(z, segments, rollout, ref_entropy, recipe)
  if custom_reward is not None:
    dense = dense + shaping.reward_fn_weight * custom_reward
  if lm_reward is not None:
    dense = dense + lm_reward
  if recipe.compat.bandit_skips_penalties and recipe.spread == 'bandit':
    return dense
  return _penalize(dense, rollout, recipe)


def lm_rewards(
  outputs: ModelOutputs, segments: Segments, rollout: Rollout, *, recipe: PPORecipe
) -> Float[Array, 'B T'] | None:
  """Returns the rewards by the language model `recipe.reward_lm`, as `shaping.lm_reward` says.

  None without such a model. With level=segment their sums over the segments are spread as the
  scores of a reward model are; a token outside of all, such as the stop token, keeps its own.
  """
  if recipe.reward_lm is None:
    return None
  settings = recipe.shaping.lm_reward
  reward = token_reward(
    outputs.lm_logprob,
    outputs.ref_logprob,
    outputs.old_logprob,
    rollout.response_mask,
    kind=settings.kind,
    coef=settings.coef,
    clip=settings.clip or None,  # 0 in the settings: none
  )
  if settings.level == 'token':
    return reward
  pooled = jax.vmap(pool)(reward, segments)
  spread = _spread(pooled, segments, rollout, outputs.ref_entropy, recipe)
  return spread + jnp.where(segments.segment_id < 0, reward, 0)


def _spread(
  z: Float[Array, 'B T'],
  segments: Segments,
  rollout: Rollout,
  ref_entropy: Float[Array, 'B T'],
  recipe: PPORecipe,
) -> Float[Array, 'B T']:
  """Spreads what each segment earns over its tokens."""
  segmentation = recipe.segmenter.segmentation

  def spread_out(z, segments, mask, entropy):
    return dense_reward(
      z,
      segments,
      mask,
      spread=recipe.spread,
      length_norm=recipe.shaping.length_norm,
      aggregation=segmentation.aggregation,
      temperature=segmentation.softmax_temperature,
      entropy=entropy,
    )

  return jax.vmap(spread_out)(z, segments, rollout.response_mask, ref_entropy)


def _penalize(
  dense: Float[Array, 'B T'], rollout: Rollout, recipe: PPORecipe
) -> Float[Array, 'B T']:
  shaping, compat, mask = recipe.shaping, recipe.compat, rollout.response_mask
  at_end = functools.partial(
    end_penalty, kind=shaping.missing_eos_penalty, value=shaping.missing_eos_penalty_value
  )
  dense = jax.vmap(at_end)(dense, mask, rollout.finished)
  threshold = jnp.full(len(mask), shaping.length_threshold)
  if compat.padded_length and shaping.length_penalty == 'threshold':
    threshold = padded_length_threshold(
      shaping.length_threshold, rollout.prompt_length, compat.micro_batch_size
    )

  def penalize_length(dense, mask, threshold):
    return length_penalty(
      dense,
      mask,
      kind=shaping.length_penalty,
      value=shaping.length_penalty_value,
      threshold=threshold,
    )

  return jax.vmap(penalize_length)(dense, mask, threshold)
