"""Makes one score of a whole response out of the scores of its segments.

Not here: the cuts (`segmentation`), the loss on two such scores (`losses.bradley_terry`).

To add an aggregation: write it with the common signature (score, segments, temperature) and name it
in AGGREGATIONS. Scores are read at the last token of each segment; elsewhere they may be NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from segjax.rl.masked import at_least_float32, masked_sum
from segjax.types import Segments


def mean(score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike) -> Float[Array, '']:
  """Σ_j s_j / J over the J segments, which count alike whatever their length; as published."""
  return sum_(score, segments, temperature) / jnp.maximum(segments.num_segments, 1)


def sum_(score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike) -> Float[Array, '']:
  """Σ_j s_j: more segments, more score."""
  del temperature
  return masked_sum(score, segments.end)


def min_(score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike) -> Float[Array, '']:
  """min_j s_j: a response is as good as its worst segment. Equal ones share the gradient."""
  del temperature
  score = at_least_float32(score)
  return _or_zero(jnp.min(jnp.where(segments.end, score, jnp.inf)), segments)


def max_(score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike) -> Float[Array, '']:
  """max_j s_j: a response is as good as its best segment. Equal ones share the gradient."""
  del temperature
  score = at_least_float32(score)
  return _or_zero(jnp.max(jnp.where(segments.end, score, -jnp.inf)), segments)


def last(score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike) -> Float[Array, '']:
  """s_J, the score of the last segment."""
  del temperature
  is_last = segments.segment_id == segments.num_segments - 1
  return masked_sum(score, segments.end & is_last)


def softmax(
  score: Float[Array, 'T'], segments: Segments, temperature: ScalarLike
) -> Float[Array, '']:
  """Σ_j softmax(s / τ)_j s_j: the mean for large τ, the maximum for small τ > 0."""
  top = jax.lax.stop_gradient(max_(score, segments, temperature))
  # Outside the ends the score is set to the top, where the exponential cannot overflow.
  score = jnp.where(segments.end, at_least_float32(score), top)
  weight = jnp.exp((score - top) / temperature)
  total = masked_sum(weight, segments.end)
  return masked_sum(weight * score, segments.end) / jnp.where(segments.num_segments > 0, total, 1)


AGGREGATIONS = {
  'mean': mean,
  'sum': sum_,
  'min': min_,
  'max': max_,
  'last': last,
  'softmax': softmax,
}


def sequence_score(
  score: Float[Array, 'T'],
  segments: Segments,
  aggregation: str = 'mean',
  *,
  temperature: ScalarLike = 1.0,
) -> Float[Array, '']:
  """Score of a whole response, f(s_1 ... s_J) of its J segments' scores.

  s_j is the score at the last token of segment j. The paper leaves f to the task and publishes the
  mean; see Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    score: read at the last token of each segment; elsewhere it may be anything, NaN included.
    segments: the segments of the response.
    aggregation: f, one of AGGREGATIONS.
    temperature: τ > 0 of 'softmax', in the unit of the score; the others ignore it.

  Returns:
    The score, in its own unit and at least float32; 0 if there are no segments.

  Raises:
    ValueError: on an unknown aggregation.
  """
  if aggregation not in AGGREGATIONS:
    raise ValueError(f'aggregation={aggregation!r} is unknown; use one of {tuple(AGGREGATIONS)}.')
  return AGGREGATIONS[aggregation](score, segments, temperature)


def _or_zero(x: Float[Array, ''], segments: Segments) -> Float[Array, '']:
  return jnp.where(segments.num_segments > 0, x, 0)
