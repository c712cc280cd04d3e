"""Cuts one response into segments, at marked tokens or by the entropy of the reference model.

Not here: other ways to mark tokens (`cuts`), what a segment is worth (`normalizer`, `rewards`), nor
how a threshold is chosen (`threshold`). Entropy is the cut of Yin et al. 2025,
https://arxiv.org/abs/2501.02790.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.rl.recurrences import spaced
from segjax.types import Segments

GRANULARITIES = ('segment', 'token', 'bandit')


def content_mask(
  response_mask: Bool[Array, 'T'], finished: Bool[Array, ''], *, stop_inside: bool = False
) -> Bool[Array, 'T']:
  """Marks the tokens that lie in some segment.

  That is the response without the stop token that ends it, if it is finished. A response of nothing
  but a stop token has no content, whether or not the stop token lies in segments.

  Args:
    response_mask: True on the response, one contiguous run that may begin anywhere.
    finished: whether the last token of the response is a stop token.
    stop_inside: whether the stop token is content too.
  """
  last = response_mask & ~_next(response_mask)
  content = response_mask & ~(last & finished)
  return response_mask & jnp.any(content) if stop_inside else content


def segment(
  entropy: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  finished: Bool[Array, ''],
  *,
  granularity: str = 'segment',
  entropy_threshold: ScalarLike = 2.0,
  min_length: int = 1,
  stop_inside: bool = False,
) -> Segments:
  """Cuts a response into segments where the reference model was unsure how to go on.

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
    min_length: see `segment_at`.
    stop_inside: see `segment_at`.

  Returns:
    The segments; none for a response that is empty or only a stop token.

  Raises:
    ValueError: on an unknown granularity, or a min_length below 1.
  """
  return segment_at(
    entropy > entropy_threshold,
    response_mask,
    finished,
    granularity=granularity,
    min_length=min_length,
    stop_inside=stop_inside,
  )


def segment_at(
  boundary: Bool[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  finished: Bool[Array, ''],
  *,
  granularity: str = 'segment',
  min_length: int = 1,
  stop_inside: bool = False,
) -> Segments:
  """Cuts a response into segments before the tokens that are marked.

  start_t = content_t and (t is the first content token, or boundary_t and the segment that ends at
  t − 1 has at least n tokens)

  Cuts are decided from left to right, each on what the cuts before it left. The last segment ends
  with the content and may be shorter than n.

  Args:
    boundary: True where a segment may start; what it says of the first content token, of tokens
      that are no content and of the stop token is ignored. 'token' and 'bandit' ignore all of it.
    response_mask: True on the response, one contiguous run that may begin anywhere.
    finished: whether the last token of the response is a stop token.
    granularity: one of GRANULARITIES.
    min_length: n, in tokens; plays no part for 'token' and 'bandit'. Above 1 it costs a loop.
    stop_inside: whether the stop token belongs to the last segment, which then ends at it and is
      scored there; else it lies in none. For 'bandit' it always belongs, since the one reward is
      read at the last token of the response.

  Returns:
    The segments; none for a response that is empty or only a stop token.

  Raises:
    ValueError: on an unknown granularity, or a min_length below 1.
  """
  if min_length < 1:
    raise ValueError(f'min_length={min_length} is below 1; every segment has a token.')
  _check_granularity(granularity)
  stop_inside = stop_inside or granularity == 'bandit'
  content = content_mask(response_mask, finished, stop_inside=stop_inside)
  first = content & ~previous(content)
  before_stop = content_mask(response_mask, finished)
  if granularity == 'bandit':
    start = first
  elif granularity == 'token':
    start = before_stop
  else:
    start = first | (before_stop & boundary)
    start = spaced(start, min_length) if min_length > 1 else start
  end = content & (_next(start) | ~_next(content))
  segment_id = _running_count(start) - 1
  return Segments(
    start=start,
    end=end,
    segment_id=jnp.where(content, segment_id, -1),
    num_segments=jnp.sum(start, dtype=jnp.int32),
  )


def previous(mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """mask_{t−1}; False before the beginning."""
  return jnp.concatenate([jnp.zeros_like(mask[:1]), mask[:-1]])


def _running_count(mark: Bool[Array, 'T']) -> Int[Array, 'T']:
  """How many marks there are up to and including each token.

  In rows of 32 by a product of zeros and ones, exact at any precision of the multiplier: XLA on CPU
  is faster at it than at a cumulative sum over all tokens.
  """
  length, row = mark.shape[0], 32
  rows = jnp.pad(mark.astype(jnp.float32), (0, -length % row)).reshape(-1, row)
  within = rows @ jnp.triu(jnp.ones((row, row), jnp.float32))
  before = jnp.cumsum(within[:, -1]) - within[:, -1]
  return (within + before[:, None]).reshape(-1)[:length].astype(jnp.int32)


def _check_granularity(granularity: str) -> None:
  if granularity not in GRANULARITIES:
    raise ValueError(f'granularity={granularity!r} is unknown; use one of {GRANULARITIES}.')


def _next(mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """mask_{t+1}; False past the end."""
  return jnp.concatenate([mask[1:], jnp.zeros_like(mask[:1])])
