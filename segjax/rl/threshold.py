"""Chooses the entropy threshold on sample responses: by quantile, or by the length of segments.

Not here: where the samples come from, nor the cut itself (`segmentation`). These functions look at
a whole batch, since the threshold is common to all responses. The paper tunes it for each model by
hand; see Yin et al. 2025, https://arxiv.org/abs/2501.02790.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.rl.masked import at_least_float32
from segjax.rl.segmentation import content_mask, segment


def threshold_for_quantile(
  entropy: Float[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  quantile: ScalarLike,
) -> Float[Array, '']:
  """The quantile of the entropies of tokens that could start a segment, as a threshold.

  Those are the content tokens but for the first of each response, which starts one anyway. Between
  two entropies the quantile is linear, as in numpy.

  Args:
    entropy: of the distribution each token was drawn from, in nats.
    response_mask: True on each response, one contiguous run that may begin anywhere.
    finished: whether the response's last token is a stop token.
    quantile: the share, in [0, 1].

  Returns:
    The threshold in nats; 0 if no token could start a segment.
  """
  ordered, count = _candidates(entropy, response_mask, finished)
  position = quantile * jnp.maximum(count - 1, 0).astype(ordered.dtype)
  below = jnp.floor(position).astype(jnp.int32)
  above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
  share = position - below.astype(position.dtype)
  low, high = ordered[below], ordered[above]
  return jnp.where(count > 0, low + share * (high - low), 0)


def threshold_for_length(
  entropy: Float[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  target_length: ScalarLike,
  *,
  min_length: int = 1,
) -> Float[Array, '']:
  """The threshold c ≥ 0 whose mean segment length is nearest to the target, as a ratio.

  length(c) = content tokens / segments, over the batch;  minimise |ln length(c) − ln target|

  length(c) only changes at entropies that occur, and never falls as c rises, which bisection over
  the sorted entropies needs. With a minimum length that is so because cutting as early as allowed,
  from left to right, makes as many segments as any choice among the boundaries could, and a higher
  threshold leaves fewer boundaries to choose from.

  Args:
    entropy: of the distribution each token was drawn from, in nats.
    response_mask: True on each response, one contiguous run that may begin anywhere.
    finished: whether the response's last token is a stop token.
    target_length: wanted mean length, in tokens.
    min_length: as `segmentation.segment` takes it.

  Returns:
    The threshold in nats, midway between two neighbouring entropies so that rounding moves no cut;
    of two lengths equally near, that of the shorter segments. A target beyond what the responses
    can give ends at the smallest entropies or 1 nat above the largest.

  Raises:
    ValueError: on a min_length below 1.
  """
  entropy = at_least_float32(entropy)
  ordered, count = _candidates(entropy, response_mask, finished)
  target = jnp.log(jnp.asarray(target_length, entropy.dtype))

  threshold = functools.partial(_threshold_at, ordered, count)

  def log_length(level):
    length, _ = _statistics(entropy, response_mask, finished, threshold(level), min_length)
    return jnp.log(jnp.maximum(length, 1))

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) // 2
    too_short = log_length(middle) < target
    return jnp.where(too_short, middle + 1, low), jnp.where(too_short, high, middle)

  # The first level that is long enough, or the last level there is.
  bracket = jnp.zeros((), jnp.int32), count
  _, level = jax.lax.fori_loop(0, entropy.size.bit_length(), halve, bracket)
  before = jnp.maximum(level - 1, 0)
  level = jnp.where(
    jnp.abs(log_length(before) - target) <= jnp.abs(log_length(level) - target), before, level
  )
  # Entropies equal to the one below the threshold belong below it too.
  chosen = threshold(level)
  return threshold(jnp.searchsorted(ordered, chosen, side='right').astype(jnp.int32))


def threshold_curve(
  entropy: Float[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  thresholds: Float[Array, 'N'],
  *,
  min_length: int = 1,
) -> tuple[Float[Array, 'N'], Float[Array, 'N']]:
  """Mean segment length and number of segments at each threshold.

  Thresholds are evaluated one at a time, so that memory does not grow with their number.

  Args:
    entropy: of the distribution each token was drawn from, in nats.
    response_mask: True on each response, one contiguous run that may begin anywhere.
    finished: whether the response's last token is a stop token.
    thresholds: in nats.
    min_length: as `segmentation.segment` takes it.

  Returns:
    (mean_length, segments_per_response): content tokens per segment, and segments per response
    that has content; 0 if none has.

  Raises:
    ValueError: on a min_length below 1.
  """
  statistics = functools.partial(
    _statistics, entropy, response_mask, finished, min_length=min_length
  )
  return jax.lax.map(statistics, thresholds)


def _threshold_at(ordered, count, level):
  """Threshold above the `level` smallest entropies and, where possible, below the next."""
  low = jnp.where(level > 0, ordered[level - 1], 0)
  high = jnp.where(level < count, ordered[jnp.minimum(level, count - 1)], low + 2)
  middle = (low + high) / 2
  return jnp.where(middle < high, middle, low)  # neighbours in floating point have no middle


def _candidates(
  entropy: Float[Array, 'B T'], response_mask: Bool[Array, 'B T'], finished: Bool[Array, 'B']
) -> tuple[Float[Array, 'N'], Int[Array, '']]:
  """Entropies of the content tokens that are not first, sorted with infinity behind; how many."""
  content = jax.vmap(content_mask)(response_mask, finished)
  follows = content & jnp.pad(content[:, :-1], ((0, 0), (1, 0)))
  entropy = jnp.where(follows, at_least_float32(entropy), jnp.inf)
  return jnp.sort(entropy.reshape(-1)), jnp.sum(follows, dtype=jnp.int32)


def _statistics(entropy, response_mask, finished, threshold, min_length):
  """(mean segment length, segments per response that has any) at one threshold."""
  cut = functools.partial(segment, entropy_threshold=threshold, min_length=min_length)
  segments = jax.vmap(cut)(entropy, response_mask, finished)
  dtype = at_least_float32(entropy).dtype
  tokens = jnp.sum(segments.segment_id >= 0, dtype=jnp.int32).astype(dtype)
  count = jnp.sum(segments.num_segments, dtype=jnp.int32).astype(dtype)
  responses = jnp.sum(segments.num_segments > 0, dtype=jnp.int32).astype(dtype)
  return tokens / jnp.maximum(count, 1), count / jnp.maximum(responses, 1)
