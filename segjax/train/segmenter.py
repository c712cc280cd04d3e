"""Cuts batches of responses as a `Segmentation` says.

The rules of cutting are `rl.segmentation`'s; here they meet token ids and settings.
"""

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
  """A segmentation, with the token ids that end a segment where its cut is by delimiter."""

  segmentation: Segmentation
  delimiter_ids: tuple[int, ...] = ()

  @property
  def needs_entropy(self) -> bool:
    """Whether the reference has to be run over the text."""
    return self.segmentation.granularity == 'segment' and self.segmentation.boundary == 'entropy'

  @property
  def threshold(self) -> float | None:
    """Nats above which a segment begins; None where entropy does not cut."""
    return self.segmentation.entropy_threshold if self.needs_entropy else None


def make_segmenter(segmentation: Segmentation, tokenizer: ChatTokenizer) -> Segmenter:
  """The cutter of that segmentation for texts in that tokenizer's ids."""
  is_delimited = segmentation.granularity == 'segment' and segmentation.boundary == 'delimiter'
  ids = tokenizer.ids_ending_in(segmentation.delimiters) if is_delimited else ()
  return Segmenter(segmentation, ids)


def segment_batch(
  ids: Int[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  entropy: Float[Array, 'B T'],
  cutter: Segmenter,
) -> Segments:
  """The segments of each row.

  Args:
    ids: tokens, read where the cut is by delimiter.
    response_mask: True on the response, stop token included.
    finished: whether the response's last token is a stop token.
    entropy: of the distribution each token was drawn from, in nats; read where the cut is by it.
    cutter: how.
  """
  s = cutter.segmentation
  if s.boundary == 'fixed_length':
    boundary = jax.vmap(functools.partial(fixed_length_boundary, length=s.segment_length))(
      response_mask
    )
  elif s.boundary == 'delimiter':
    boundary = jax.vmap(delimiter_boundary)(_is_one_of(ids, cutter.delimiter_ids))
  else:
    boundary = entropy > s.entropy_threshold
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
  """One score for each response out of those of its segments."""
  one = functools.partial(
    sequence_score,
    aggregation=segmentation.aggregation,
    temperature=segmentation.softmax_temperature,
  )
  return jax.vmap(one)(score, segments)


def _is_one_of(ids: Int[Array, 'B T'], members: tuple[int, ...]) -> Bool[Array, 'B T']:
  table = np.zeros(max(members, default=0) + 1, bool)
  table[list(members)] = True
  return jnp.asarray(table).at[ids].get(mode='fill', fill_value=False)
