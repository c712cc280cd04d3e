"""Cuts one response into segments by the entropy of the reference model.

Not here: what a segment is worth (`normalizer`, `rewards`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.types import Segments

GRANULARITIES = ('segment', 'token', 'bandit')


def content_mask(
  response_mask: Bool[Array, 'T'], finished: Bool[Array, ''], granularity: str = 'segment'
) -> Bool[Array, 'T']:
  """Marks the tokens that lie in some segment.

  For 'segment' and 'token' that is the response without the stop token that ends it, if it is
  finished. For 'bandit' it is the response itself, since the one reward is read at its last token.
  A response of nothing but a stop token has no content at any granularity.

  Args:
    response_mask: True on the response, one contiguous run that may begin anywhere.
    finished: whether the last token of the response is a stop token.
    granularity: one of GRANULARITIES.

  Raises:
    ValueError: on an unknown granularity.
  """
  _check_granularity(granularity)
  last = response_mask & ~_next(response_mask)
  content = response_mask & ~(last & finished)
  if granularity == 'bandit':
    return response_mask & jnp.any(content)
  return content


def segment(
  entropy: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  finished: Bool[Array, ''],
  *,
  granularity: str = 'segment',
  entropy_threshold: ScalarLike = 2.0,
) -> Segments:
  """Cuts a response into segments.

  start_t = content_t and (t is the first content token, or H_t > c)

  H_t is the entropy of the distribution token t was drawn FROM, aligned like its log-prob; the
  inequality is strict. Code built on unshifted logits marks t − 1 as an end instead. The entropy
  of the first token never matters. 'token' makes every content token a segment and 'bandit' makes
  one segment of all; neither looks at the entropies or the threshold.
  See Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    entropy: H_t under the reference model, in nats, over the full vocabulary at temperature 1.
    response_mask: True on the response, one contiguous run that may begin anywhere.
    finished: whether the last token of the response is a stop token.
    granularity: one of GRANULARITIES.
    entropy_threshold: c, in nats.

  Returns:
    The segments; none for a response that is empty or only a stop token.

  Raises:
    ValueError: on an unknown granularity.
  """
  content = content_mask(response_mask, finished, granularity)
  first = content & ~_previous(content)
  if granularity == 'segment':
    start = first | (content & (entropy > entropy_threshold))
  elif granularity == 'token':
    start = content
  else:
    start = first
  end = content & (_next(start) | ~_next(content))
  segment_id = jnp.cumsum(start, dtype=jnp.int32) - 1
  return Segments(
    start=start,
    end=end,
    segment_id=jnp.where(content, segment_id, -1),
    num_segments=jnp.sum(start, dtype=jnp.int32),
  )


def end_index(segments: Segments) -> Int[Array, 'T']:
  """Position of the last token of the segment that a token lies in; T − 1 if no end follows."""
  length = segments.end.shape[0]
  position = jnp.arange(length, dtype=jnp.int32)
  return jax.lax.cummin(jnp.where(segments.end, position, length - 1), reverse=True)


def segment_length(segments: Segments) -> Int[Array, 'T']:
  """Number of tokens in the segment that a token lies in; 0 outside every segment."""
  position = jnp.arange(segments.start.shape[0], dtype=jnp.int32)
  start_index = jax.lax.cummax(jnp.where(segments.start, position, 0))
  return jnp.where(segments.segment_id >= 0, end_index(segments) - start_index + 1, 0)


def _check_granularity(granularity: str) -> None:
  if granularity not in GRANULARITIES:
    raise ValueError(f'granularity={granularity!r} is unknown; use one of {GRANULARITIES}.')


def _next(mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """mask_{t+1}; False past the end."""
  return jnp.concatenate([mask[1:], jnp.zeros_like(mask[:1])])


def _previous(mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """mask_{t−1}; False before the beginning."""
  return jnp.concatenate([jnp.zeros_like(mask[:1]), mask[:-1]])
