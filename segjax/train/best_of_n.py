"""Searches for responses with a high score: the best of n, whole or segment by segment.

Whole: n responses are sampled, and the one with the highest score is kept. By segments: n
continuations of what is kept so far are sampled, the next segment of the best one is kept, and so
on. That is blockwise best-of-n (Mudgal et al. 2023, https://arxiv.org/abs/2310.17022) with segments
by entropy in place of blocks of one size, as in Li et al. 2024, https://arxiv.org/abs/2406.16306.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.requests import GenerationResult
from segjax.train.continuations import continue_prefixes, join_prefixes
from segjax.train.reward_scoring import SegmentScorer, reference_signal, score_sequences
from segjax.train.rollout import CollectedRollout, RolloutSampler, place_rollout
from segjax.train.segmenter import segment_batch, sequence_scores
from segjax.types import PromptBatch, Segments, Sequences


@dataclasses.dataclass(frozen=True)
class Search:
  """How responses are searched for.

  Attributes:
    sampler: of continuations, `samples_per_prompt` at a time.
    scorer: the reward model, and the segments that it scores.
    segment_tokens: length of the continuations in which the next segment is looked for, at least 2;
      of a longer segment the part so far is compared. 0: whole responses.
    read_text: (params, options, number of the prompt of each, where segments end that may be kept)
      -> the options with the scores there of a reward model that reads text, as
      `TextSegments.option_reader` makes it; None if it reads these tokens itself.
  """

  sampler: RolloutSampler
  scorer: SegmentScorer
  segment_tokens: int = 0
  read_text: Callable[[dict[str, Any], Sequences, np.ndarray, Array], Sequences] | None = None

  def __post_init__(self):
    if self.sampler.samples_per_prompt > 1:
      check_differ(self.sampler.settings)


def check_differ(rollout: RolloutSettings) -> None:
  """Raises UserError if all responses to a prompt are equal."""
  if rollout.temperature == 0:
    raise UserError(
      'config.rollout.temperature=0 samples equal responses, of which none is the best; raise it.'
    )


class Found(NamedTuple):
  """What is kept of B responses: their tokens so far, [B, T], and scores, [B].

  Attributes:
    score: of the segments so far, aggregated as the reward model was trained.
  """

  responses: GenerationResult
  score: np.ndarray

  @property
  def is_over(self) -> Bool[np.ndarray, 'B']:
    """Whether nothing can follow."""
    full = self.responses.response_mask.all(1)
    return self.responses.finished | self.responses.non_finite | full


def search(
  params: dict[str, Any],
  prompts: PromptBatch,
  key: jax.Array,
  settings: Search,
  found: Found,
  index: np.ndarray | None = None,
) -> Iterator[Found]:
  """Yields what is kept of the response to each prompt, round by round; the last is the result.

  Args:
    params: of 'policy', 'reference' and 'reward'.
    prompts: on the host, [B].
    key: random key.
    settings: how to search.
    found: how each response begins; see `nothing_found`.
    index: number of each prompt, for its random numbers; 0, 1, ... by default.
  """
  samples, size = settings.sampler.samples_per_prompt, len(found.score)
  for number in range(found.responses.response_mask.shape[1]):
    if found.is_over.all():
      return
    own_key = jax.random.fold_in(key, number)
    options, score = _options(params, prompts, own_key, settings, found, index)
    best = np.arange(size) * samples + score.reshape(size, samples).argmax(1)  # first of equals
    new = Found(GenerationResult(*(x[best] for x in options)), score[best])
    found = jax.tree.map(functools.partial(_where_rows, found.is_over), found, new)
    yield found
    if not settings.segment_tokens:
      return


def best_rollout(params: dict[str, Any], settings: Search) -> Callable[..., CollectedRollout]:
  """Returns a function to use in place of `rollout.rollout`: it finds one response to each prompt.

  Args:
    params: see `search`.
    settings: how to search; the sampler of the function's caller says what is sampled.
  """
  samples = settings.sampler.samples_per_prompt

  def find(policy, prompts, key, sampler, index=None):
    own = dataclasses.replace(
      settings, sampler=dataclasses.replace(sampler, samples_per_prompt=samples)
    )
    found = nothing_found(
      len(prompts.prompt_length), sampler.settings.max_new_tokens, sampler.stop_ids[0]
    )
    *_, last = search(params | {'policy': policy}, prompts, key, own, found, index)
    return place_rollout(prompts, last.responses, sampler)

  return find


def nothing_found(size: int, limit: int, fill: int) -> Found:
  """Returns B = `size` empty responses with room for T = `limit` tokens, padded by `fill`."""
  shape = size, limit
  ids, logprob, none = np.full(shape, fill, np.int32), np.zeros(shape, np.float32), np.zeros(size)
  responses = GenerationResult(
    ids, np.zeros(shape, bool), none.astype(bool), logprob, logprob, none.astype(bool)
  )
  return Found(responses, none)


def _options(
  params: dict[str, Any],
  prompts: PromptBatch,
  key: jax.Array,
  settings: Search,
  found: Found,
  index: np.ndarray | None,
) -> tuple[GenerationResult, Float[np.ndarray, 'N']]:
  """Returns what may come next of each response, and their scores; anything of those over."""
  sampler, limit = settings.sampler, found.responses.response_mask.shape[1]
  # Those that are over stay in the batch as new ones: its size is that of one program.
  begun = found.responses._replace(
    response_mask=found.responses.response_mask & ~found.is_over[:, None]
  )
  start = begun.response_mask.sum(1)
  prefixes = [ids[mask].tolist() for ids, mask in zip(begun[0], begun[1], strict=True)]
  room = np.minimum(settings.segment_tokens or limit, limit - start)
  new = continue_prefixes(params['policy'], prompts, prefixes, key, sampler, room.tolist(), index)
  repeat = functools.partial(np.repeat, repeats=sampler.samples_per_prompt, axis=0)
  options = _append(GenerationResult(*map(repeat, begun)), new)
  length = options.response_mask.sum(1)
  sequences = _sequences(PromptBatch(*map(repeat, prompts)), options, settings)
  begun_at = repeat(np.asarray(prompts.prompt_length) + start).astype(np.int32)
  cut = sharding.place_batch((begun_at, ~options.finished & (length < limit)), sampler.mesh)
  how = {'scorer': settings.scorer, 'by_segment': bool(settings.segment_tokens)}
  if settings.read_text is not None:
    number = np.arange(len(start)) if index is None else index
    signal, ends = _ends(params['reference'], sequences, *cut, **how)
    sequences = dataclasses.replace(sequences, ref_signal=signal)
    sequences = settings.read_text(params, sequences, repeat(number), ends)
  end, score = _judge(params['reward'], params['reference'], sequences, *cut, **how)
  end, score = processes.to_host((end, score))
  kept = end + 1 - repeat(np.asarray(prompts.prompt_length))
  mask = np.arange(limit) < kept[:, None]
  options = options._replace(
    response_mask=mask & options.response_mask, finished=options.finished & (kept == length)
  )
  return options, np.where(options.non_finite, -np.inf, score)


def _append(begun: GenerationResult, new: GenerationResult) -> GenerationResult:
  """Returns the responses with the new tokens behind those that they have, [N, T]."""
  whole = jax.tree.map(np.array, begun)._replace(finished=new.finished, non_finite=new.non_finite)
  for row, (start, mask) in enumerate(
    zip(begun.response_mask.sum(1), new.response_mask, strict=True)
  ):
    place = slice(start, start + mask.sum())
    for name in ('response_ids', 'response_mask', 'logprob', 'sample_logprob'):
      getattr(whole, name)[row, place] = getattr(new, name)[row][mask]
  return whole


def _sequences(prompts: PromptBatch, responses: GenerationResult, settings: Search) -> Sequences:
  """Returns prompts and responses as rows on the mesh."""
  ids = [x[mask].tolist() for x, mask in zip(responses[0], responses[1], strict=True)]
  joined = join_prefixes(prompts, ids, responses.response_mask.shape[1])
  position = np.arange(joined.prompt_ids.shape[1])
  before, length = (np.asarray(x)[:, None] for x in (prompts.prompt_length, joined.prompt_length))
  mask = (before <= position) & (position < length)
  return Sequences(
    *sharding.place_batch((joined.prompt_ids, mask, responses.finished), settings.sampler.mesh)
  )


@functools.partial(jax.jit, static_argnames=('scorer', 'by_segment'))
def _judge(
  reward: Any,
  reference: Any,
  sequences: Sequences,
  first: Int[Array, 'N'],
  is_cut_off: Bool[Array, 'N'],
  *,
  scorer: SegmentScorer,
  by_segment: bool,
) -> tuple[Int[Array, 'N'], Float[Array, 'N']]:
  """Returns (position of the last token to keep, score of the response up to there).

  Args:
    reward: parameters of the reward model.
    reference: those of the reference.
    sequences: the options.
    first: position of the first new token of each.
    is_cut_off: whether more tokens would follow the last one.
    scorer: how they are scored.
    by_segment: keeps the segment of the first new token, instead of all.
  """
  score, segments = score_sequences(reward, reference, sequences, scorer)
  end, segments = _kept(segments, sequences, first, is_cut_off, by_segment)
  return end, sequence_scores(score, segments, scorer.segmenter.segmentation)


@functools.partial(jax.jit, static_argnames=('scorer', 'by_segment'))
def _ends(
  reference: Any,
  sequences: Sequences,
  first: Int[Array, 'N'],
  is_cut_off: Bool[Array, 'N'],
  *,
  scorer: SegmentScorer,
  by_segment: bool,
) -> tuple[Float[Array, 'N S'], Bool[Array, 'N S']]:
  """Returns (what boundaries read of the reference, the ends at which `_judge` reads scores)."""
  signal = reference_signal(reference, sequences, scorer)
  segments = segment_batch(
    sequences.ids, sequences.response_mask, sequences.finished, signal, scorer.segmenter
  )
  return signal, _kept(segments, sequences, first, is_cut_off, by_segment)[1].end


def _kept(
  segments: Segments,
  sequences: Sequences,
  first: Int[Array, 'N'],
  is_cut_off: Bool[Array, 'N'],
  by_segment: bool,
) -> tuple[Int[Array, 'N'], Segments]:
  """Returns (position of the last token to keep, the segments up to there).

  Of a segment that goes on, the part so far is the last one.
  """
  position, mask = jnp.arange(sequences.ids.shape[1])[None], sequences.response_mask

  def last_of(is_member):
    return jnp.max(jnp.where(is_member & mask, position, -1), axis=1)

  last = end = last_of(mask)
  if by_segment:
    own = jnp.take_along_axis(segments.segment_id, first[:, None], axis=1)
    end = last_of(segments.segment_id == own)
    # A stop token behind the segment ends the response with it. So what follows a kept segment is
    # never a stop token, which is banned as the first token of a continuation; and so that this
    # holds in the middle of a segment, its last token is drawn again.
    end = jnp.where(sequences.finished & (end == last - 1), last, end)
    end = jnp.where(is_cut_off & (end == last), last - 1, end)
  kept = position <= end[:, None]
  return end, dataclasses.replace(
    segments,
    start=segments.start & kept,
    end=(segments.end & kept) | ((position == end[:, None]) & (segments.segment_id >= 0)),
    segment_id=jnp.where(kept, segments.segment_id, -1),
    num_segments=jnp.sum(segments.start & kept, axis=1).astype(segments.num_segments.dtype),
  )


def _where_rows(condition: Bool[np.ndarray, 'B'], x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return np.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)
