"""Computes one reward per token from the scores of a rollout, before the clip and the KL penalty.

Applies functions of `rl` in this order: normalise or redistribute, credit, spread, mix with other
rewards (`reward_mixing`), penalise. Clip and KL penalty follow in `rl.rewards.shaped_reward`.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import Compat, RewardShaping
from segjax.rl.lm_rewards import pool, token_reward
from segjax.rl.normalizer import normalize
from segjax.rl.redistribution import by_attention
from segjax.rl.rewards import end_penalty, length_penalty, red
from segjax.rl.spreads import dense_reward, min_credit
from segjax.train.compat import padded_length_threshold
from segjax.train.recipe import PPORecipe, RewardSource
from segjax.train.scoring import ModelOutputs
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.types import Normalizer, Rollout, Segments


def segment_responses(
  rollout: Rollout,
  outputs: ModelOutputs,
  score: Float[Array, 'B T'],
  segmenter: Segmenter,
  compat: Compat,
) -> Segments:
  """Returns the segments of each response.

  Args:
    rollout: the responses.
    outputs: of the networks.
    score: raw scores of the reward model that is read at these segments.
    segmenter: how to segment.
    compat: with force_eos the last token of every response is a stop token.
  """
  # By frozen networks: the cuts of a text stay the same while the policy changes.
  signals = {'logprob': outputs.ref_logprob, 'score': score}
  return segment_batch(
    rollout.response_ids,
    rollout.response_mask,
    rollout.finished | compat.force_eos,
    signals.get(segmenter.signal, outputs.ref_entropy),
    segmenter,
  )


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
    return normalized(outputs.score, segments, normalizer, shaping)
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


def normalized(
  score: Float[Array, 'B T'], segments: Segments, normalizer: Normalizer, shaping: RewardShaping
) -> Float[Array, 'B T']:
  """Returns (score - Mean(p)) / Std(p), read at the last token of each segment."""
  floor = resolve_std_floor_ratio(shaping)
  function = functools.partial(normalize, normalizer=normalizer, std_floor_ratio=floor)
  return jax.vmap(function)(score, segments)


def credited(
  z: Float[Array, 'B T'],
  segments: Segments,
  shaping: RewardShaping,
  part: Float[Array, 'B T'] | None = None,
) -> Float[Array, 'B T']:
  """Returns z, or a part of it, weighed as `shaping.credit` says."""
  if shaping.credit != 'min':
    return z if part is None else part
  weigh = functools.partial(min_credit, temperature=shaping.credit_temperature)
  if part is None:
    return jax.vmap(weigh)(z, segments)
  return jax.vmap(lambda z, segments, part: weigh(z, segments, part=part))(z, segments, part)


def dense_rewards(
  parts: dict[str, Float[Array, 'B T']], rollout: Rollout, *, recipe: PPORecipe
) -> Float[Array, 'B T']:
  """Returns the reward of each token, before the clip and the KL penalty.

  The sum of the parts, then the penalties for missing EOS and for length.

  Args:
    parts: `reward_mixing.reward_parts`.
    rollout: the responses.
    recipe: the penalties.
  """
  dense = functools.reduce(operator.add, parts.values())
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
  spread = spread_rewards(pooled, segments, rollout, outputs.ref_entropy, recipe, recipe.shaping)
  return spread + jnp.where(segments.segment_id < 0, reward, 0)


def spread_rewards(
  z: Float[Array, 'B T'],
  segments: Segments,
  rollout: Rollout,
  ref_entropy: Float[Array, 'B T'],
  source: PPORecipe | RewardSource,
  shaping: RewardShaping,
) -> Float[Array, 'B T']:
  """Spreads what each segment earns over its tokens, as a reward model's source says."""
  segmentation = source.segmenter.segmentation

  def spread_out(z, segments, mask, entropy):
    return dense_reward(
      z,
      segments,
      mask,
      spread=source.spread,
      length_norm=shaping.length_norm,
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
