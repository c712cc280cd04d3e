"""Whether low segment rewards lie where people marked errors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from segjax import processes
from segjax.config.training_settings import resolve_std_floor_ratio
from segjax.data.batches import eval_batches, pad_rows
from segjax.data.span_annotations import Span, TokenizedSpans
from segjax.evaluation.intervals import RankedTokens, auc_interval, auc_within
from segjax.report.console import track
from segjax.run.stage import Stage
from segjax.train.reward_step import SegmentScorer, segment_rewards
from segjax.types import Normalizer, Sequences

_ROUND = 8  # the rows' length is rounded up to a multiple of this

# The reward of the segment that each token of a response lies in, and that segment's index or -1.
TokenRewards = tuple[np.ndarray, np.ndarray]


def segment_rewards_by_token(
  stage: Stage,
  params: Any,
  reference: Any,
  marked: Sequence[TokenizedSpans],
  scorer: SegmentScorer,
  normalizer: Normalizer,
) -> list[TokenRewards]:
  """Normalised rewards of the responses, token by token; each token has its whole segment's."""
  size, found = stage.settings.evaluate_reward.batch_size, []
  width = -(-max(len(one.ids) for one in marked) // _ROUND) * _ROUND
  width = min(width, scorer.reward.max_position_embeddings)
  batches = eval_batches(len(marked), size)
  for rows, real in track(stage.name, batches, -(-len(marked) // size), 'marked responses'):
    batch = [marked[row] for row in rows]
    sequences = Sequences(*map(stage.to_device, _padded(batch, width)))
    reward, segments = processes.to_host(
      segment_rewards(
        params,
        reference,
        sequences,
        normalizer,
        scorer=scorer,
        std_floor_ratio=resolve_std_floor_ratio(stage.settings.reward_shaping),
      )
    )
    for i, one in enumerate(batch[:real]):
      span = slice(one.prompt_length, len(one.ids))
      found.append(_by_token(reward[i, span], segments.end[i, span], segments.segment_id[i, span]))
  return found


def figures(
  marked: Sequence[TokenizedSpans], rewards: Sequence[TokenRewards], seed: int
) -> dict[str, Any]:
  """How well -reward ranks characters inside of marked spans above those outside.

  The unit is the character, as people marked them: so models of different tokenizers compare. A
  character has the reward of the segment in which its token lies. Characters without one, cut off
  or trimmed by the template, count nowhere.

  Returns:
    auc: P(a character inside has the lower reward), a tie counting half, over all responses.
    auc_within: the same within each response that has both kinds, averaged.
    types: both for each type of error: its characters against those in no span of any type.
    responses, spans, spans_cut (no character of which was scored), characters, marked (share).
    Intervals are 95 % by bootstrap over responses.
  """
  every = rank_segments(marked, rewards, lambda span: True)
  kinds = sorted({span.kind for one in marked for span in one.spans})
  spans = [(one, span) for one in marked for span in one.spans]
  inside, outside = int(every.inside.sum()), int(every.outside.sum())
  return {
    **_both(every, seed),
    'types': {
      kind: {
        **_both(rank_segments(marked, rewards, lambda span, kind=kind: span.kind == kind), seed),
        'spans': sum(span.kind == kind for _, span in spans),
      }
      for kind in kinds
    },
    'responses': len(marked),
    'spans': len(spans),
    'spans_cut': sum(bool((one.token_of_char[s.start : s.end] < 0).all()) for one, s in spans),
    'characters': inside + outside,
    'marked': inside / max(inside + outside, 1),
  }


def rank_segments(
  marked: Sequence[TokenizedSpans],
  rewards: Sequence[TokenRewards],
  is_sought: Callable[[Span], bool],
) -> RankedTokens:
  """A row for each segment: -reward, its characters in a sought span, and those in none at all."""
  rows = []
  for number, (one, (reward, segment)) in enumerate(zip(marked, rewards, strict=True)):
    sought, any_span = (np.zeros(len(one.token_of_char), bool) for _ in range(2))
    for span in one.spans:
      any_span[span.start : span.end] = True
      sought[span.start : span.end] |= is_sought(span)
    token = one.token_of_char[one.token_of_char >= 0]
    is_in_segment = segment[token] >= 0
    token, (sought, any_span) = (
      token[is_in_segment],
      (x[one.token_of_char >= 0][is_in_segment] for x in (sought, any_span)),
    )
    score = np.zeros(int(segment.max(initial=-1)) + 1)
    score[segment[token]] = -reward[token]
    count = [np.bincount(segment[token], x, len(score)) for x in (sought, ~any_span)]
    rows.append(RankedTokens(score, *count, np.full(len(score), number)))
  return RankedTokens(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def _both(rows: RankedTokens, seed: int) -> dict[str, Any]:
  return {'auc': auc_interval(rows, seed), 'auc_within': auc_within(rows, seed)}


def _padded(
  batch: Sequence[TokenizedSpans], width: int
) -> tuple[Int[np.ndarray, 'B S'], np.ndarray, np.ndarray]:
  """(ids, mask of the response, whether it is finished)."""
  ids, is_real = pad_rows([response.ids for response in batch], width, 0)
  prompt_length = np.array([response.prompt_length for response in batch])
  mask = is_real & (np.arange(width) >= prompt_length[:, None])
  return ids, mask, np.array([response.finished for response in batch])


def _by_token(
  reward: Float[np.ndarray, 'T'], end: np.ndarray, segment: Int[np.ndarray, 'T']
) -> TokenRewards:
  """The reward at a segment's end, at each of its tokens."""
  at_end = reward[end]
  return np.where(segment >= 0, at_end[segment] if len(at_end) else 0.0, 0.0), segment
