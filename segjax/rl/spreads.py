"""Gives the tokens of a response what its segments are worth: one reward per token.

Not here: the normalisation of z (`normalizer`); penalties, the clamp and the KL penalty
(`rewards`).

To add a way of spreading: write it with the common signature (z, segments, response_mask) and name
it in SPREADS. z is read at the last token of each segment; what it holds elsewhere is ignored.
"""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.aggregation import min_, sequence_score
from segjax.rl.masked import at_least_float32
from segjax.rl.recurrences import latest, linear_backwards, rank
from segjax.types import Segments


def even_split(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """Each of a segment's n tokens gets z / n: over a segment they sum to z.

  See Yin et al. 2025, https://arxiv.org/abs/2501.02790.
  """
  # The rank of a segment's last token is the segment's length; z counts at no other.
  return repeat(at_least_float32(z) / rank(segments.start), segments, response_mask)


def repeat(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """Each token of a segment gets z, undivided."""
  del response_mask
  z = at_least_float32(z)

  # Backwards, each end hands its z on.
  reward = latest(z, segments.end, jnp.zeros((), z.dtype), reverse=True)
  return jnp.where(segments.segment_id >= 0, reward, 0)


def end_only(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """The last token of a segment gets z, the others 0."""
  del response_mask
  return jnp.where(segments.end, at_least_float32(z), 0)


def entropy_weighted(
  z: Float[Array, 'T'],
  segments: Segments,
  response_mask: Bool[Array, 'T'],
  *,
  entropy: Float[Array, 'T'],
) -> Float[Array, 'T']:
  """Each token of a segment gets z H_t / Σ H over the segment: more where more was open.

  Over a segment they sum to z. A segment whose H_t are all 0 is split evenly. H_t is the entropy of
  the reference, in nats, aligned like a log-prob.

  The weights are those of GTPO (Tan et al. 2025, https://arxiv.org/abs/2508.04349) with another
  sum: there H_t of the policy is divided by the sum over the responses of a group at the same
  position t, which moves reward between responses; here no reward leaves its segment.
  """
  weight = jnp.where(segments.segment_id >= 0, jnp.maximum(at_least_float32(entropy), 0), 0)
  # Backwards, the sum from each token to the end of its segment: at the first, that over all.
  remaining = linear_backwards((~segments.end).astype(weight.dtype), weight)
  total = latest(remaining, segments.start, jnp.zeros((), weight.dtype))
  share = weight / jnp.where(total > 0, total, 1)
  weighted = repeat(z, segments, response_mask) * share
  return jnp.where(total > 0, weighted, even_split(z, segments, response_mask))


def bandit(
  z: Float[Array, 'T'],
  segments: Segments,
  response_mask: Bool[Array, 'T'],
  *,
  aggregation: str = 'mean',
  temperature: ScalarLike = 1.0,
) -> Float[Array, 'T']:
  """The last real token of the response, stop token included, gets the aggregate of all z."""
  score = sequence_score(z, segments, aggregation, temperature=temperature)
  return jnp.where(last_token(response_mask), score, 0)


SPREADS = {
  'even_split': even_split,
  'repeat': repeat,
  'end_only': end_only,
  'entropy_weighted': entropy_weighted,
  'bandit': bandit,
}
CREDITS = ('sum', 'min')


def min_credit(
  z: Float[Array, 'T'],
  segments: Segments,
  temperature: ScalarLike,
  part: Float[Array, 'T'] | None = None,
) -> Float[Array, 'T']:
  """Weighs segments so that a response is worth its worst one: z_j ↦ w_j z_j.

  w_j = exp(−z_j / T) / Σ_i exp(−z_i / T), over the segments of the response

  For T → 0 the worst segment keeps its z and the others get 0: the return from any segment up to
  the worst is min z, and from later ones 0, so that good segments do not make up for a bad one, nor
  many of them for few. For large T this is the mean. The approximate min-form credit of PURE
  (https://arxiv.org/abs/2504.15275), there of process rewards in [−1, 1] with
  T = 0.1.

  Args:
    z: normalised reward, read at the last token of each segment.
    segments: the segments of the response.
    temperature: T > 0, in the unit of z.
    part: what is weighed in place of z, such as one of several parts that add up to it.

  Returns:
    What replaces z, or the part, at the last token of each segment; 0 elsewhere.
  """
  lowest = min_(z, segments, temperature)
  z = jnp.where(segments.end, at_least_float32(z), lowest)
  weight = jnp.where(segments.end, jnp.exp((lowest - z) / temperature), 0)
  weighed = z if part is None else jnp.where(segments.end, at_least_float32(part), 0)
  return weighed * weight / jnp.maximum(jnp.sum(weight), 1)


def dense_reward(
  z: Float[Array, 'T'],
  segments: Segments,
  response_mask: Bool[Array, 'T'],
  *,
  spread: str = 'even_split',
  length_norm: bool = False,
  aggregation: str = 'mean',
  temperature: ScalarLike = 1.0,
  entropy: Float[Array, 'T'] | None = None,
) -> Float[Array, 'T']:
  """Spreads the normalised rewards of the segments over the tokens.

  It has more than seven parameters: the last three are options of single spreads.

  Args:
    z: normalised reward, read at the last token of each segment.
    segments: the segments of the response.
    response_mask: True on the response, stop token included.
    spread: one of SPREADS.
    length_norm: also divide by the number of response tokens, stop token included.
    aggregation: what 'bandit' makes of several segments, one of `aggregation.AGGREGATIONS`; the
      other spreads have no use for it.
    temperature: of the aggregation 'softmax', in the unit of z.
    entropy: of 'entropy_weighted', in nats; the other spreads have no use for it.

  Returns:
    The reward of each token; 0 outside the response, and everywhere if it has no segment.

  Raises:
    ValueError: on an unknown spread or aggregation.
  """
  check_name('spread', spread, SPREADS)
  options = {}
  if spread == 'bandit':
    options = {'aggregation': aggregation, 'temperature': temperature}
  elif spread == 'entropy_weighted':
    options = {'entropy': entropy}
  reward = SPREADS[spread](z, segments, response_mask, **options)
  if length_norm:
    reward = reward / jnp.maximum(jnp.sum(response_mask), 1)
  return reward


def last_token(response_mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """True at the last real token."""
  return response_mask & ~jnp.concatenate([response_mask[1:], jnp.zeros_like(response_mask[:1])])


def check_name(field: str, name: str, valid: Iterable[str]) -> None:
  """Raises ValueError on a name that is not valid."""
  if name not in valid:
    raise ValueError(f'{field}={name!r} is unknown; use one of {tuple(valid)}.')
