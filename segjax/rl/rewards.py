"""Turns the normalised rewards of segments into one reward per token.

Not here: the normalisation (`normalizer`) and the KL estimate (`kl`).

To add a way of spreading: write it with the common signature (z, segments, response_mask) and name
it in SPREADS. z is read at the last token of each segment; what it holds elsewhere is ignored.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.masked import at_least_float32, masked_sum
from segjax.rl.segmentation import end_index, segment_length
from segjax.types import Segments


def even_split(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """Each of a segment's n tokens gets z / n: over a segment they sum to z.

  See Yin et al. 2025, https://arxiv.org/abs/2501.02790.
  """
  return repeat(z, segments, response_mask) / jnp.maximum(segment_length(segments), 1)


def repeat(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """Each token of a segment gets z, undivided."""
  del response_mask
  return jnp.where(segments.segment_id >= 0, at_least_float32(z)[end_index(segments)], 0)


def end_only(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """The last token of a segment gets z, the others 0."""
  del response_mask
  return jnp.where(segments.end, at_least_float32(z), 0)


def bandit(
  z: Float[Array, 'T'], segments: Segments, response_mask: Bool[Array, 'T']
) -> Float[Array, 'T']:
  """The last real token of the response, stop token included, gets the mean of z over segments."""
  mean = masked_sum(z, segments.end) / jnp.maximum(segments.num_segments, 1)
  after = jnp.concatenate([response_mask[1:], jnp.zeros_like(response_mask[:1])])
  return jnp.where(response_mask & ~after, mean, 0)


SPREADS = {'even_split': even_split, 'repeat': repeat, 'end_only': end_only, 'bandit': bandit}


def dense_reward(
  z: Float[Array, 'T'],
  segments: Segments,
  response_mask: Bool[Array, 'T'],
  *,
  spread: str = 'even_split',
  length_norm: bool = False,
) -> Float[Array, 'T']:
  """Spreads the normalised rewards of the segments over the tokens.

  Args:
    z: normalised reward, read at the last token of each segment.
    segments: the segments of the response.
    response_mask: True on the response, stop token included.
    spread: one of SPREADS.
    length_norm: also divide by the number of response tokens, stop token included.

  Returns:
    The reward of each token; 0 outside the response, and everywhere if it has no segment.

  Raises:
    ValueError: on an unknown spread.
  """
  if spread not in SPREADS:
    raise ValueError(f'spread={spread!r} is unknown; use one of {tuple(SPREADS)}.')
  reward = SPREADS[spread](z, segments, response_mask)
  if length_norm:
    reward = reward / jnp.maximum(jnp.sum(response_mask), 1)
  return reward


def shaped_reward(
  dense: Float[Array, 'T'],
  kl: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  *,
  kl_coef: ScalarLike,
  clip: ScalarLike = 10.0,
) -> Float[Array, 'T']:
  """Clamps the dense reward, then takes off the KL penalty.

  reward_t = clip(dense_t, −clip, clip) − max(β, 0) kl_t

  The clamp comes after the spreading and before the penalty, which it does not bound. The stop
  token pays its penalty too. See Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    dense: reward of each token.
    kl: estimate of the KL at each token, in nats.
    response_mask: True on the response, stop token included.
    kl_coef: β; a negative one counts as 0.
    clip: largest size of a dense reward.

  Returns:
    The reward that the policy is trained on; 0 outside the mask.
  """
  clipped = jnp.clip(at_least_float32(dense), -clip, clip)
  reward = clipped - jnp.maximum(kl_coef, 0) * at_least_float32(kl)
  return jnp.where(response_mask, reward, 0)
