"""Segments batches of responses by the functions of `rl.segmentation` that the settings select."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax.config.settings import Segmentation
from segjax.data.tokenizer import ChatTokenizer
from segjax.rl.aggregation import sequence_score
from segjax.rl.segmentation import delimiter_boundary, fixed_length_boundary, segment_at
from segjax.types import Segments


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """A segmentation, with the token ids that end a segment if its boundary is delimiter."""

  segmentation: Segmentation
  delimiter_ids: tuple[int, ...] = ()  # hashable: static in jitted functions

  @property
  def needs_entropy(self) -> bool:
    """Whether the entropies of the reference are needed."""
    return self.segmentation.granularity == 'segment' and self.segmentation.boundary == 'entropy'

  @property
  def threshold(self) -> float | None:
    """Entropy in nats above which a segment begins; None for other boundaries."""
    return self.segmentation.entropy_threshold if self.needs_entropy else None


def make_segmenter(segmentation: Segmentation, tokenizer: ChatTokenizer) -> Segmenter:
  """Returns the segmenter for texts in the ids of `tokenizer`."""
  is_delimited = segmentation.granularity == 'segment' and segmentation.boundary == 'delimiter'
  # Only where it is used: a vocabulary without a match is an error.
  ids = tokenizer.ids_ending_in(segmentation.delimiters) if is_delimited else ()
  return Segmenter(segmentation, ids)


def segment_batch(
  ids: Int[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  entropy: Float[Array, 'B T'],
  segmenter: Segmenter,
) -> Segments:
  """Returns the segments of each row.

  Args:
    ids: tokens, read if the boundary is delimiter.
    response_mask: True on the response, stop token included.
    finished: whether the response's last token is a stop token.
    entropy: entropy of the distribution each token was drawn from, in nats, read if the boundary
      is entropy.
    segmenter: how to segment.
  """
  s = segmenter.segmentation
  if s.boundary == 'fixed_length':
    boundary = jax.vmap(functools.partial(fixed_length_boundary, length=s.segment_length))(
      response_mask
    )
  elif s.boundary == 'delimiter':
    boundary = jax.vmap(delimiter_boundary)(_is_one_of(ids, segmenter.delimiter_ids))
  else:
    boundary = entropy > s.entropy_threshold  # strictly, as in the paper
  divide = functools.partial(
    segment_at,
    granularity=s.granularity,
    min_length=s.min_segment_length,
    stop_inside=s.include_eos,
  )
  return jax.vmap(divide)(boundary, response_mask, finished)


def sequence_scores(
  score: Float[Array, 'B T'], segments: Segments, segmentation: Segmentation
) -> Float[Array, 'B']:
  """Returns one score per response, aggregated over its segments."""
  aggregate = functools.partial(
    sequence_score,
    aggregation=segmentation.aggregation,
    temperature=segmentation.softmax_temperature,
  )
  return jax.vmap(aggregate)(score, segments)


def _is_one_of(ids: Int[Array, 'B T'], members: tuple[int, ...]) -> Bool[Array, 'B T']:
  # A lookup, because a comparison with each member would take [B, T, members] of memory.
  table = np.zeros(max(members, default=0) + 1, bool)
  table[list(members)] = True
  # Ids beyond the table are not members; plain indexing would clamp them to its last entry.
  return jnp.asarray(table).at[ids].get(mode='fill', fill_value=False)
