"""Quality of a reward model, from its scores of held-out pairs.

Not here: the scores of the responses (`aggregation`) and the loss that trained them (`losses`),
nor reading the pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.rl.masked import at_least_float32

_NUM_BINS = 10  # of confidence, between 1/2 and 1


def preference_metrics(
  chosen: Float[Array, 'N'],
  rejected: Float[Array, 'N'],
  chosen_length: Int[Array, 'N'],
  rejected_length: Int[Array, 'N'],
) -> dict[str, Float[Array, '']]:
  """Quality of a reward model on pairs of which the first response was preferred.

  The model's probability that the first one wins is p = σ(chosen − rejected). The calibration error
  is the expected one of Guo et al. 2017, https://arxiv.org/abs/1706.04599:

  ECE = Σ_bins |pairs in bin| / N · |mean correctness − mean confidence|

  over ten equal bins of the confidence max(p, 1 − p) in [1/2, 1]; a pair counts as correct where
  p > 1/2, and half where p = 1/2.

  Args:
    chosen: scores of the preferred responses.
    rejected: scores of the others.
    chosen_length: tokens of the preferred responses.
    rejected_length: tokens of the others.

  Returns:
    accuracy = how often the preferred response scores higher, a tie counting half; margin = mean
    difference of the scores; loss = mean −ln p, in nats; ece = ECE; length_baseline_accuracy =
    the accuracy of preferring the longer response, which a model should beat. All in at least
    float32, 0 without pairs, NaN if a score is.
  """
  difference = at_least_float32(chosen) - at_least_float32(rejected)
  correct = _wins(difference)
  confidence = jax.nn.sigmoid(jnp.abs(difference))
  return {
    'accuracy': _mean(correct),
    'margin': _mean(difference),
    'loss': _mean(jax.nn.softplus(-difference)),
    'ece': _calibration_error(confidence, correct),
    'length_baseline_accuracy': _mean(
      _wins((chosen_length - rejected_length).astype(difference.dtype))
    ),
  }


def _wins(difference):
  """1 where the first is larger, 0 where the second is, 1/2 where neither."""
  return (jnp.sign(difference) + 1) / 2


def _calibration_error(confidence, correct):
  bin_index = jnp.floor((confidence - 0.5) * 2 * _NUM_BINS).astype(jnp.int32)
  bin_index = jnp.clip(bin_index, 0, _NUM_BINS - 1)  # a confidence of 1 lies in the last
  gap = jax.ops.segment_sum(correct - confidence, bin_index, _NUM_BINS)
  return jnp.sum(jnp.abs(gap)) / max(confidence.shape[0], 1)


def _mean(x):
  return jnp.sum(x) / max(x.shape[0], 1)
