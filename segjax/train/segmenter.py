"""Segments batches of responses by the functions of `rl.cuts` that the settings select."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax.config.settings import Segmentation
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.rl.aggregation import sequence_score
from segjax.rl.cuts import CUTS, Response
from segjax.rl.segmentation import segment_at
from segjax.train.user_functions import load_token_function
from segjax.types import Segments


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """A segmentation, with the ids of tokens that end a segment if its boundary is in their text."""

  segmentation: Segmentation
  closing_ids: tuple[int, ...] = ()  # hashable: static in jitted functions

  @property
  def signal(self) -> str:
    """What boundaries read of each token, as in `rl.cuts.Cut`; '' for nothing."""
    s = self.segmentation
    return CUTS[s.boundary].signal if s.granularity == 'segment' else ''

  @property
  def needs_reference(self) -> bool:
    """Whether the reference has to be run."""
    return self.signal in ('entropy', 'logprob')

  @property
  def threshold(self) -> float | None:
    """Entropy in nats above which a segment begins; None for other boundaries."""
    is_entropy = self.segmentation.boundary == 'entropy' and self.needs_reference
    return self.segmentation.entropy_threshold if is_entropy else None


def make_segmenter(segmentation: Segmentation, tokenizer: ChatTokenizer) -> Segmenter:
  """Returns the segmenter for texts in the ids of `tokenizer`.

  Raises:
    UserError: the boundary is in the text, and no token of the vocabulary has any.
  """
  ids = ()
  if segmentation.granularity == 'segment' and segmentation.boundary == 'delimiter':
    ids = tokenizer.ids_ending_in(segmentation.delimiters)
  elif segmentation.granularity == 'segment' and segmentation.boundary == 'function':
    path, key = segmentation.boundary_fn, 'reward_model.segmentation.boundary_fn'
    ids = tokenizer.ids_where(load_token_function(path, key))
    if not ids:
      raise UserError(
        f'config.{key}={path!r} is true of no token of the vocabulary; return True where a segment '
        'ends.'
      )
  return Segmenter(segmentation, ids)


def segment_batch(
  ids: Int[Array, 'B T'],
  response_mask: Bool[Array, 'B T'],
  finished: Bool[Array, 'B'],
  signal: Float[Array, 'B T'],
  segmenter: Segmenter,
) -> Segments:
  """Returns the segments of each row.

  Args:
    ids: tokens.
    response_mask: True on the response, stop token included.
    finished: whether the response's last token is a stop token.
    signal: the number of each token that `segmenter.signal` names; anything where it names none.
    segmenter: how to segment.
  """
  s, cut = segmenter.segmentation, CUTS[segmenter.segmentation.boundary]
  closes = _is_one_of(ids, segmenter.closing_ids)
  options = {name: getattr(s, name) for name in cut.options}

  def segments(mask, finished, signal, ids, closes):
    boundary = mask  # not read
    if s.granularity == 'segment':
      boundary = cut.function(Response(mask, finished, signal, ids, closes), **options)
    return segment_at(
      boundary,
      mask,
      finished,
      granularity=s.granularity,
      min_length=1 if 'min_segment_length' in options else s.min_segment_length,
      stop_inside=s.include_eos,
    )

  return jax.vmap(segments)(response_mask, finished, signal, ids, closes)


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
