"""Normalises a segment's raw score by where in the response it lies.

Mean(p) = w_mean ln p + b_mean and Std(p) = w_std ln p + b_std of the score are fitted on many
responses (Yin et al. 2025, https://arxiv.org/abs/2501.02790) and then divided out.
Not here: reading the responses and saving the fit, nor the Huber fit itself (`huber`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.rl.huber import huber_fit, r_squared
from segjax.rl.masked import at_least_float32, masked_mean, masked_sum
from segjax.types import Normalizer, Segments

# What each kind is fitted on: none on nothing, and is the identity; global on the scores of all
# segments; last on those of each response's last segment; scalar on whole responses' scores, as
# the published numbers for bandit were; regression on Mean(p) and Std(p) of all segments. All but
# the last are constant in p (`fit_constant`); the caller selects their scores.
KINDS = ('none', 'global', 'last', 'scalar', 'regression')
# What a bin of p counts in the regression: all the same, as published, or by its number of scores.
WEIGHTINGS = ('uniform', 'count')

# Fitted on 60,000 pairs of preference_700K, in units of the raw scores of the paper's released
# reward models. '<model>/<granularity>'; the threshold is 2.0 nats unless '@' names another.
PUBLISHED = {
  'llama3_8b_sft/segment': Normalizer(0.8967, 0.5680, 0.8572, 4.1667),
  'llama3_8b_sft/token': Normalizer(1.7340, 0.9906, 1.3212, 5.4513),
  'llama3_8b_sft/bandit': Normalizer(0.0, 0.0, -0.81640625, 2.953125),
  'llama31_8b_instruct/segment': Normalizer(0.8345, 0.4780, 0.8798, 3.7358),
  'llama31_8b_instruct/token': Normalizer(1.6268, 0.6254, 0.6419, 4.9217),
  'llama31_8b_instruct/bandit': Normalizer(0.0, 0.0, -0.828125, 2.9375),
  'phi3_mini_instruct/segment': Normalizer(0.7209, 0.2330, 0.6055, 2.6555),
  'phi3_mini_instruct/segment@1.75': Normalizer(0.7668, 0.2569, 0.4705, 2.8339),
  'phi3_mini_instruct/token': Normalizer(0.9628, 0.3796, 1.2917, 3.5006),
  'phi3_mini_instruct/bandit': Normalizer(0.0, 0.0, -0.51953125, 2.15625),
}

_LOG_OFFSET = 1e-10  # the published fits read ln(p + 1e-10)
_NUM_BINS = 1001  # p to three decimals: 0.000, 0.001, ..., 1.000
# A bin boundary is an exact tie between two of those decimals. Which way Python's '.3f' prints it
# depends on the binary fraction nearest to it, so the direction is computed by Python itself.
_TIES = [(2 * k + 1) / 2000 for k in range(_NUM_BINS - 1)]
_TIE_ROUNDS_UP = [round(1000 * float(f'{tie:.3f}')) > k for k, tie in enumerate(_TIES)]


class Quality(NamedTuple):
  """How well a normaliser describes the bins that it was fitted on.

  Attributes:
    r2_mean: R² of Mean(p); 1 is perfect, 0 no better than a constant.
    r2_std: R² of Std(p).
    rms_mean: root mean square of the bins' means less Mean(p), in the unit of the score.
    rms_std: the same of the standard deviations.
    num_bins: how many bins were used.
  """

  r2_mean: Float[Array, '']
  r2_std: Float[Array, '']
  rms_mean: Float[Array, '']
  rms_std: Float[Array, '']
  num_bins: Int[Array, '']


def relative_position(segments: Segments) -> Float[Array, 'T']:
  """p = (segment_id + 1) / num_segments, in (0, 1]; 1 outside every segment, where ln p is 0."""
  inside = segments.segment_id >= 0
  dtype = jnp.result_type(float)
  rank = jnp.where(inside, segments.segment_id + 1, 1).astype(dtype)
  # Chosen token by token: XLA divides by a number that a whole row shares by multiplying with its
  # reciprocal, which would leave the last p of 41 segments just below 1.
  count = jnp.where(inside, segments.num_segments, 1).astype(dtype)
  return rank / count


def mean_std(
  position: Float[Array, '*N'], normalizer: Normalizer, std_floor: ScalarLike | None = None
) -> tuple[Float[Array, '*N'], Float[Array, '*N']]:
  """Mean(p) and Std(p) of the score at relative position p.

  Mean = w_mean ln(p + 1e-10) + b_mean
  Std  = max(w_std ln(p + 1e-10) + b_std, floor)

  Args:
    position: p in (0, 1].
    normalizer: the fit.
    std_floor: smallest Std, in the unit of the score. Without one Std may reach 0 and turn
      negative at small p, as the published token fit of Llama-3-SFT does below p = 0.00407.
  """
  log_position = jnp.log(at_least_float32(position) + _LOG_OFFSET)
  mean = normalizer.w_mean * log_position + normalizer.b_mean
  std = normalizer.w_std * log_position + normalizer.b_std
  return mean, std if std_floor is None else jnp.maximum(std, std_floor)


def normalize(
  score: Float[Array, 'T'],
  segments: Segments,
  normalizer: Normalizer,
  std_floor_ratio: ScalarLike | None = 0.01,
) -> Float[Array, 'T']:
  """z = (score − Mean(p)) / Std(p) at every token, with the p of its segment.

  Args:
    score: raw score read at each token.
    segments: the segments of the response.
    normalizer: the fit.
    std_floor_ratio: the floor of Std as a fraction of b_std; None for no floor, as the paper's
      code has it, at the price of singular and negative Std at small p.

  Returns:
    z, in the score's precision but at least float32; 0 outside every segment.
  """
  std_floor = None
  if std_floor_ratio is not None:
    # Never 0: a fit of equal scores has b_std 0, and must give 0 rather than NaN.
    std_floor = jnp.maximum(std_floor_ratio * normalizer.b_std, 1e-6)
  mean, std = mean_std(relative_position(segments), normalizer, std_floor)
  score = at_least_float32(score)
  return jnp.where(segments.segment_id >= 0, (score - mean) / std, 0).astype(score.dtype)


def bin_moments(
  position: Float[Array, 'N'], score: Float[Array, 'N'], mask: Bool[Array, 'N']
) -> tuple[Int[Array, '1001'], Float[Array, '1001'], Float[Array, '1001']]:
  """Count, mean and population standard deviation of the scores in each bin of p.

  Bin k holds the p that Python prints as k/1000 with three decimals. Bin 0 holds p < 0.0005.

  Args:
    position: p of each segment, in (0, 1].
    score: raw score of each segment.
    mask: True on the segments that count.

  Returns:
    (count, mean, std) by bin; all 0 in an empty bin.
  """
  position, score = at_least_float32(position), at_least_float32(score)
  score = jnp.where(mask, score, 0)
  ties = jnp.asarray(_TIES, position.dtype)
  below = jnp.searchsorted(ties, position, side='left')
  nearest = jnp.minimum(below, _NUM_BINS - 2)
  rounds_up = (position == ties[nearest]) & jnp.asarray(_TIE_ROUNDS_UP)[nearest]
  index = jnp.where(mask, below + rounds_up, _NUM_BINS)  # past the last bin: dropped

  def total(x):
    return jax.ops.segment_sum(x, index, _NUM_BINS)

  count = total(mask.astype(jnp.int32))
  divisor = jnp.maximum(count, 1).astype(score.dtype)
  # Two passes, the second around the first mean: a float32 sum over a large bin is not exact.
  rough = total(score) / divisor
  deviation = score - rough[jnp.minimum(index, _NUM_BINS - 1)]
  correction = total(deviation) / divisor
  variance = total(jnp.square(deviation)) / divisor - jnp.square(correction)
  return count, rough + correction, jnp.sqrt(jnp.maximum(variance, 0))


def fit_regression(
  position: Float[Array, 'N'],
  score: Float[Array, 'N'],
  mask: Bool[Array, 'N'],
  *,
  weighting: str = 'uniform',
  min_count: int = 1,
  first_bin: int = 1,
) -> Normalizer:
  """Fits Mean(p) and Std(p) on the moments of the bins, by two Huber regressions on ln p.

  minimise Σ_k v_k Huber(y_k − w ln p_k − b) for y the means, then the standard deviations
  v_k = 1 for weighting 'uniform', the number of scores in bin k for 'count'

  A bin of one score has a standard deviation of 0 and pulls Std(p) down; 'uniform' lets it weigh as
  much as any other. See `huber.huber_fit` and Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    position: p of each segment, in (0, 1].
    score: raw score of each segment.
    mask: True on the segments that count.
    weighting: one of WEIGHTINGS.
    min_count: bins of fewer scores are left out.
    first_bin: bins below it are left out. Bin 0, which only responses of more than 2,000 segments
      fill, counts as the point p = 0; at ln 1e-10 = −23 it can outweigh all others.

  Returns:
    The fit, in the unit of the score; all fields are 0 if no bin is used.

  Raises:
    ValueError: on an unknown weighting.
  """
  at, used, weight, mean, std = _bins(position, score, mask, weighting, min_count, first_bin)
  log_position = jnp.log(at + _LOG_OFFSET)
  w_mean, b_mean, _ = huber_fit(log_position, mean, used, weight=weight)
  w_std, b_std, _ = huber_fit(log_position, std, used, weight=weight)
  return Normalizer(w_mean=w_mean, w_std=w_std, b_mean=b_mean, b_std=b_std)


def fit_constant(score: Float[Array, '*N'], mask: Bool[Array, '*N']) -> Normalizer:
  """Constant normaliser: mean and population standard deviation of the scores masked in."""
  mean = masked_mean(score, mask)
  std = jnp.sqrt(masked_mean(jnp.square(at_least_float32(score) - mean), mask))
  zero = jnp.zeros_like(mean)
  return Normalizer(w_mean=zero, w_std=zero, b_mean=mean, b_std=std)


def fit_quality(
  position: Float[Array, 'N'],
  score: Float[Array, 'N'],
  mask: Bool[Array, 'N'],
  normalizer: Normalizer,
  *,
  weighting: str = 'uniform',
  min_count: int = 1,
  first_bin: int = 1,
) -> Quality:
  """How well Mean(p) and Std(p) describe the bins that `fit_regression` reads with these options.

  Means over bins are weighted as the regression weights them. All 0 if no bin is used.

  Raises:
    ValueError: on an unknown weighting.
  """
  at, used, weight, mean, std = _bins(position, score, mask, weighting, min_count, first_bin)
  fitted_mean, fitted_std = mean_std(at, normalizer)
  total = masked_sum(weight, used)

  def rms(residual):
    square = masked_sum(weight * jnp.square(residual), used)
    return jnp.sqrt(square / jnp.where(total > 0, total, 1))

  return Quality(
    r2_mean=r_squared(mean, fitted_mean, used, weight),
    r2_std=r_squared(std, fitted_std, used, weight),
    rms_mean=rms(mean - fitted_mean),
    rms_std=rms(std - fitted_std),
    num_bins=jnp.sum(used, dtype=jnp.int32),
  )


def _bins(position, score, mask, weighting, min_count, first_bin):
  """(p, used, weight, mean, std) of each bin."""
  if weighting not in WEIGHTINGS:
    raise ValueError(f'weighting={weighting!r} is unknown; use one of {WEIGHTINGS}.')
  count, mean, std = bin_moments(position, score, mask)
  bin_index = jnp.arange(_NUM_BINS)
  used = (count >= max(min_count, 1)) & (bin_index >= first_bin)
  weight = count.astype(mean.dtype) if weighting == 'count' else jnp.ones_like(mean)
  return bin_index.astype(mean.dtype) / (_NUM_BINS - 1), used, weight, mean, std
