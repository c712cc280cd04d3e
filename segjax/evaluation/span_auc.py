"""Measures whether segments with low rewards are those in which people annotated errors."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from segjax import processes
from segjax.data.ragged import pad_rows
from segjax.data.row_forms import Message
from segjax.data.span_annotations import Span, TokenizedSpans
from segjax.evaluation.intervals import RankedTokens, auc_interval, auc_within
from segjax.types import Segments, Sequences

_WIDTH_MULTIPLE = 8  # tokens; rows are padded to a multiple of it

# Reward and index of the segment that each token of a response lies in; 0 and -1 outside.
TokenRewards = tuple[np.ndarray, np.ndarray]


def segment_rewards_by_token(
  responses: Sequence[TokenizedSpans],
  score: Callable[[Sequences], tuple[Any, Segments]],
  max_width: int,
  batches: Iterable[tuple[np.ndarray, int]],
  to_device: Callable[[Any], Any],
  prepare: Callable[[Sequences, list[list[Message]]], Sequences] | None = None,
) -> list[TokenRewards]:
  """Returns the normalised reward of each token's segment, for every response.

  Args:
    responses: tokenised responses with annotated spans.
    score: sequences -> (z at every token, segments), such as `reward_scoring.segment_rewards`.
    max_width: number of positions of the network.
    batches: `eval_batches` of the responses.
    to_device: places a batch of the host on the devices.
    prepare: sequences, prompts -> the sequences as `score` reads them, such as
      `TextSegments.add_scores`.
  """
  rewards = []
  longest = max(len(response.ids) for response in responses)
  width = min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, max_width)
  for rows, num_real in batches:
    batch = [responses[row] for row in rows]
    sequences = Sequences(*map(to_device, _padded(batch, width)))
    if prepare is not None:
      sequences = prepare(sequences, [response.prompt for response in batch])
    z, segments = processes.to_host(score(sequences))
    for i, response in enumerate(batch[:num_real]):
      span = slice(response.prompt_length, len(response.ids))
      rewards.append(_by_token(z[i, span], segments.end[i, span], segments.segment_id[i, span]))
  return rewards


def figures(
  responses: Sequence[TokenizedSpans], rewards: Sequence[TokenRewards], seed: int
) -> dict[str, Any]:
  """Measures how well -reward ranks characters inside annotated spans above those outside.

  The unit is the character, as people annotate them, so that models of different tokenizers
  compare. A character has the reward of the segment of its token. Characters without a segment
  (truncated, or trimmed by the template) are left out.

  Returns:
    auc: P(a character inside has the lower reward), a tie counting half, over all responses.
    auc_within: the same within each response that has both kinds, averaged.
    types: both for each type of error: its characters against those in no span of any type.
    responses, spans, spans_cut (spans without a scored character), characters, marked (share).
    Intervals are 95 % by bootstrap over responses.
  """
  ranked = rank_segments(responses, rewards, lambda span: True)
  kinds = sorted({span.kind for response in responses for span in response.spans})
  spans = [(response, span) for response in responses for span in response.spans]
  inside, outside = int(ranked.inside.sum()), int(ranked.outside.sum())

  def kind_figures(kind):
    rows = rank_segments(responses, rewards, lambda span: span.kind == kind)
    return {**_intervals(rows, seed), 'spans': sum(span.kind == kind for _, span in spans)}

  return {
    **_intervals(ranked, seed),
    'types': {kind: kind_figures(kind) for kind in kinds},
    'responses': len(responses),
    'spans': len(spans),
    'spans_cut': sum(
      bool((response.token_of_char[span.start : span.end] < 0).all()) for response, span in spans
    ),
    'characters': inside + outside,
    'marked': inside / max(inside + outside, 1),
  }


def rank_segments(
  responses: Sequence[TokenizedSpans],
  rewards: Sequence[TokenRewards],
  is_selected: Callable[[Span], bool],
) -> RankedTokens:
  """Returns a row per segment: -reward, its characters in selected spans, its characters in none.

  Args:
    responses: tokenised responses with annotated spans.
    rewards: `segment_rewards_by_token` of the responses.
    is_selected: whether a span counts as inside; characters of other spans count neither way.
  """
  rows = []
  for number, (response, (reward, segment)) in enumerate(zip(responses, rewards, strict=True)):
    in_selected, in_any = (np.zeros(len(response.token_of_char), bool) for _ in range(2))
    for span in response.spans:
      in_any[span.start : span.end] = True
      in_selected[span.start : span.end] |= is_selected(span)
    has_token = response.token_of_char >= 0
    token = response.token_of_char[has_token]
    in_segment = segment[token] >= 0
    token = token[in_segment]
    in_selected, in_any = (x[has_token][in_segment] for x in (in_selected, in_any))
    score = np.zeros(int(segment.max(initial=-1)) + 1)
    score[segment[token]] = -reward[token]
    count = [np.bincount(segment[token], x, len(score)) for x in (in_selected, ~in_any)]
    rows.append(RankedTokens(score, *count, np.full(len(score), number)))
  return RankedTokens(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def _intervals(rows: RankedTokens, seed: int) -> dict[str, Any]:
  return {'auc': auc_interval(rows, seed), 'auc_within': auc_within(rows, seed)}


def _padded(
  batch: Sequence[TokenizedSpans], width: int
) -> tuple[Int[np.ndarray, 'B S'], Bool[np.ndarray, 'B S'], Bool[np.ndarray, 'B']]:
  """Returns (ids, mask of the response, whether it is finished), padded to `width`."""
  ids, mask = pad_rows([response.ids for response in batch], width, 0)
  prompt_length = np.array([response.prompt_length for response in batch])
  mask &= np.arange(width) >= prompt_length[:, None]
  return ids, mask, np.array([response.finished for response in batch])


def _by_token(
  reward: Float[np.ndarray, 'T'], end: np.ndarray, segment: Int[np.ndarray, 'T']
) -> TokenRewards:
  """Returns the reward at a segment's end for each of its tokens."""
  at_end = reward[end]
  return np.where(segment >= 0, at_end[segment] if len(at_end) else 0.0, 0.0), segment
