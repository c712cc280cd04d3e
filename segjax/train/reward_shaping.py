"""From the scores of a rollout to one reward per token, before the KL penalty.

Normalise or redistribute, spread, mix with a user's reward, penalise: each step is `rl`'s, their
order is here. The clamp and the KL penalty follow in `rl.rewards.shaped_reward`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.settings import Compat, RewardShaping, Segmentation
from segjax.config.training_settings import resolve_std_floor_ratio
from segjax.rl.normalizer import normalize
from segjax.rl.rewards import dense_reward, end_penalty, length_penalty, red
from segjax.train.compat import padded_length_threshold
from segjax.types import Normalizer, Rollout, Segments


def dense_rewards(
  score: Float[Array, 'B T'],
  prompt_score: Float[Array, 'B'],
  segments: Segments,
  rollout: Rollout,
  normalizer: Normalizer,
  rule: Float[Array, 'B T'] | None,
  *,
  shaping: RewardShaping,
  spread: str,
  segmentation: Segmentation,
  compat: Compat,
) -> Float[Array, 'B T']:
  """The reward of each token, not yet clamped.

  Args:
    score: the reward model at each response token.
    prompt_score: the reward model at the last token of each prompt.
    rule: a user's reward per token, if there is one.
    spread: the name in `rl.rewards.SPREADS`.
  """
  z = _segment_rewards(score, prompt_score, segments, rollout, normalizer, shaping)
  spread_out = functools.partial(
    dense_reward,
    spread=spread,
    length_norm=shaping.length_norm,
    aggregation=segmentation.aggregation,
    temperature=segmentation.softmax_temperature,
  )
  dense = shaping.reward_model_weight * jax.vmap(spread_out)(z, segments, rollout.response_mask)
  if rule is not None:
    dense = dense + shaping.reward_fn_weight * rule
  if compat.bandit_skips_penalties and spread == 'bandit':
    return dense
  return _penalised(dense, rollout, shaping, compat)


def _segment_rewards(score, prompt_score, segments, rollout, normalizer, shaping):
  """z, read at the last token of each segment."""
  floor = resolve_std_floor_ratio(shaping)
  if shaping.redistribute == 'none':
    return jax.vmap(functools.partial(normalize, normalizer=normalizer, std_floor_ratio=floor))(
      score, segments
    )
  # The same at every position, so that differences of it add up.
  mean, std = normalizer.b_mean, jnp.maximum(normalizer.b_std, 1e-6)
  difference = functools.partial(red, baseline=shaping.red_baseline)
  return jax.vmap(difference)(
    (score - mean) / std, (prompt_score - mean) / std, segments, rollout.response_mask
  )


def _penalised(dense, rollout, shaping, compat):
  mask = rollout.response_mask
  at_end = functools.partial(
    end_penalty, kind=shaping.missing_eos_penalty, value=shaping.missing_eos_penalty_value
  )
  dense = jax.vmap(at_end)(dense, mask, rollout.finished)
  threshold = jnp.full(len(mask), shaping.length_threshold)
  if compat.padded_length and shaping.length_penalty == 'threshold':
    threshold = padded_length_threshold(
      shaping.length_threshold, rollout.prompt_length, compat.micro_batch_size
    )

  def too_long(dense, mask, threshold):
    return length_penalty(
      dense,
      mask,
      kind=shaping.length_penalty,
      value=shaping.length_penalty_value,
      threshold=threshold,
    )

  return jax.vmap(too_long)(dense, mask, threshold)
