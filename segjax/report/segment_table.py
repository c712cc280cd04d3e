"""A response as a person reads it: its segments, one a line, each with its reward."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from segjax.report.console import log, table


def render(
  ids: np.ndarray,
  segment_id: np.ndarray,
  reward: np.ndarray,
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """One line per segment, 'reward  text'.

  Args:
    ids: the response's tokens, [T].
    segment_id: the segment of each token, -1 outside, [T].
    reward: per token, [T]; a line shows the sum over its segment.
    decode: token ids to text.
  """
  lines = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    inside = segment_id == index
    lines.append(f'{reward[inside].sum():+6.2f}  {decode(ids[inside].tolist()).strip()}')
  return lines


def show(annotated: Any) -> None:
  """A `report.response_log.Annotated` as a table: a line per segment, line breaks and the like
  escaped.

  The entropy is that of the segment's first token, which is why it begins there.
  """
  if annotated.prompt:
    log(f'\n{plain(annotated.prompt[-1]["content"])}')
  has_score = any(segment.score is not None for segment in annotated.segments)
  has_reward = any(segment.reward is not None for segment in annotated.segments)
  columns = ['segment', 'tokens', 'entropy', *['score'] * has_score, *['reward'] * has_reward]
  rows = []
  for segment in annotated.segments:
    numbers = [segment.score] * has_score + [segment.reward] * has_reward
    cells = [str(len(segment.tokens)), f'{segment.entropy[0]:.2f}']
    rows.append([plain(segment.text.strip(' ')), *cells, *(f'{x:+.3f}' for x in numbers)])
  table('', columns, rows)


def plain(text: str, keep: str = '') -> str:
  """The text with control characters but those of `keep` written out, so that it is only shown."""
  return ''.join(
    c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in text
  )
