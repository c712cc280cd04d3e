"""Metrics of a rollout and its rewards, and the bounds within which PPO learns from it.

`report.metric_docs` explains each metric.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.config.reward_lines import LM_REWARD
from segjax.config.settings import PPO
from segjax.rl.masked import masked_mean, masked_sum
from segjax.train.recipe import PPORecipe
from segjax.types import Experience, Rollout, Segments

_NUM_POSITIONS = 10  # relative positions are grouped into tenths of a response


def rollout_metrics(
  experience: Experience,
  dense: Float[Array, 'B T'],
  penalty: Float[Array, 'B T'],
  recipe: PPORecipe,
) -> dict[str, Array]:
  """Returns the metrics of a rollout; those of a response are means over responses.

  objective/kl = Σ_t (log π_old - log π_ref) and objective/entropy = Σ_t -log π_old over a
  response, in nats, as in TRL.

  Args:
    experience: the scored rollout.
    dense: reward of each token before the clip and the KL penalty.
    penalty: KL penalty that was subtracted from each token's reward.
    recipe: how the responses were segmented and rewarded.
  """
  rollout, mask = experience.rollout, experience.rollout.response_mask
  segments = experience.segments
  log_ratio = rollout.old_logprob - experience.ref_logprob

  def sum_per_response(x):
    return jnp.mean(masked_sum(x, mask, axis=1))

  def largest(x, mask):
    return jnp.max(jnp.where(mask, jnp.abs(x), 0.0))  # NaN if any is

  length = jnp.sum(mask, axis=1).astype(jnp.float32)
  metrics = {
    'objective/reward': sum_per_response(dense),
    'objective/rlhf_reward': sum_per_response(experience.reward),
    'objective/non_score_reward': -sum_per_response(penalty),
    'objective/reward_std': jnp.std(masked_sum(dense, mask, axis=1)),
    'objective/scores': masked_mean(experience.score, segments.end),
    'objective/kl': sum_per_response(log_ratio),
    'objective/kl_token_max': largest(log_ratio, mask),
    'objective/entropy': -sum_per_response(rollout.old_logprob),
    'objective/ref_entropy': masked_mean(experience.ref_entropy, mask),
    'reward/token_abs_max': largest(dense, mask),
    'objective/advantage_abs_max': largest(experience.advantage, mask),
    'reward/segment_mean': masked_sum(dense, mask) / jnp.maximum(jnp.sum(segments.end), 1),
    'response/length_mean': jnp.mean(length),
    'response/length_max': jnp.max(length),
    'response/eos_rate': jnp.mean(rollout.finished.astype(jnp.float32)),
    'segments/per_response': jnp.mean(segments.num_segments.astype(jnp.float32)),
    'segments/length_mean': _segment_length(segments),
    **_logprob_mismatch(rollout),
  }
  if recipe.critic is not None:
    return_, learned = experience.return_, experience.value_mask
    metrics['critic/return_abs_max'] = largest(return_, learned)
    metrics['critic/explained_variance'] = _explained_variance(experience.value, return_, learned)
  if recipe.segmenter.segmentation.granularity == 'segment':
    metrics['segments/one_token'] = jnp.mean(one_token_segments(segments).astype(jnp.float32))
  if clip := recipe.shaping.reward_clip:
    is_rewarded = mask & (dense != 0)
    metrics['reward/clipped'] = masked_mean(
      (jnp.abs(dense) > clip).astype(dense.dtype), is_rewarded
    )
  return metrics


def part_metrics(
  parts: dict[str, Float[Array, 'B T']],
  disagreement: Float[Array, 'B T'] | None,
  segments: Segments,
  is_listed: bool,
) -> dict[str, Array]:
  """Returns reward/part/NAME of each source, and reward/disagreement of two or more reward models.

  Without config.rewards, objective/lm_reward alone, where there is such a part. A part is the mean
  over responses of its sum over tokens; the disagreement is the mean over segments of the standard
  deviation of the models' normalised scores.

  Args:
    parts: rewards of tokens by source, before penalties and clip.
    disagreement: of the models, read at the last token of each segment; None with one model.
    segments: those of the first model.
    is_listed: whether there is a config.rewards.
  """
  means = {name: jnp.mean(jnp.sum(x, axis=1)) for name, x in parts.items()}
  metrics = {'objective/lm_reward': means[LM_REWARD]} if LM_REWARD in means else {}
  if is_listed:
    metrics |= {f'reward/part/{name}': mean for name, mean in means.items()}
  if disagreement is not None:
    metrics['reward/disagreement'] = masked_mean(disagreement, segments.end)
  return metrics


def one_token_segments(segments: Segments) -> Int[Array, 'B']:
  """Returns the number of segments of each response that are a single token."""
  return jnp.sum(segments.start & segments.end, axis=-1)


def z_by_position(z: Float[Array, 'B T'], segments: Segments) -> dict[str, Array]:
  """Returns the mean normalised score of segments in each tenth of a response.

  reward/by_position/k is the mean of z over segments whose relative position
  p = (segment_id + 1) / num_segments lies in ((k - 1) / 10, k / 10], NaN where there are none.

  Args:
    z: normalised scores, read at the last token of each segment.
    segments: the segments.
  """
  last = jnp.maximum(segments.num_segments, 1)[:, None]
  # In integers, ceil(10 p) exactly: as floats 3 / 10 and 0.3 may differ.
  tenth = -(-_NUM_POSITIONS * (segments.segment_id + 1) // last)
  means = {}
  for k in range(1, _NUM_POSITIONS + 1):
    selected = segments.end & (tenth == k)
    mean = masked_mean(z, selected)
    means[f'reward/by_position/{k}'] = jnp.where(jnp.any(selected), mean, jnp.nan)
  return means


@functools.partial(jax.jit, static_argnames='ppo')
def within_bounds(metrics: dict[str, Array], ppo: PPO) -> Bool[Array, '']:
  """Returns whether PPO may learn from a rollout with these metrics.

  What is learned from must be finite: rewards, advantages, returns. KL and the largest reward must
  be finite and within `ppo.skip_if_kl_above` and `ppo.skip_if_reward_above`, where 0 sets no bound.
  """
  is_within = jnp.bool(True)
  learned = ('objective/rlhf_reward', 'objective/advantage_abs_max')
  for name in (*learned, 'critic/return_abs_max') if ppo.has_critic else learned:
    is_within &= jnp.isfinite(metrics[name])
  for name, bound in (
    ('objective/kl', ppo.skip_if_kl_above),
    ('reward/token_abs_max', ppo.skip_if_reward_above),
  ):
    is_within &= jnp.isfinite(metrics[name]) & (jnp.abs(metrics[name]) <= (bound or jnp.inf))
  return is_within


def _logprob_mismatch(rollout: Rollout) -> dict[str, Array]:
  """Returns mean and maximum over tokens of |log π sampled from - log π unfiltered|.

  {} for a rollout without `sample_logprob`.
  """
  if rollout.sample_logprob is None:
    return {}
  mask = rollout.response_mask
  gap = jnp.where(mask, jnp.abs(rollout.sample_logprob - rollout.old_logprob), 0.0)
  return {
    'rollout/logprob_mismatch': masked_mean(gap, mask),
    'rollout/logprob_mismatch_max': jnp.max(gap),
  }


def _segment_length(segments: Segments) -> Float[Array, '']:
  """Returns the mean number of tokens of a segment, over the segments of all responses."""
  return jnp.sum(segments.segment_id >= 0) / jnp.maximum(jnp.sum(segments.num_segments), 1)


def _explained_variance(
  value: Float[Array, 'B T'], return_: Float[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Float[Array, '']:
  """Returns 1 - Var(return - value) / Var(return) over the states that the critic learns from."""

  def variance(x):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

  return 1 - variance(return_ - value) / jnp.maximum(variance(return_), 1e-8)
