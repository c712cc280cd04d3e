"""Prints a response on the console as its segments, one a line, each with its numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.report.console import log, table


def format_segments(
  ids: np.ndarray,
  segment_id: np.ndarray,
  reward: np.ndarray,
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """Returns one line per segment, 'reward  text'.

  Args:
    ids: the response's tokens, [T].
    segment_id: the segment of each token, -1 outside, [T].
    reward: reward of each token, [T]; a line shows the sum over its segment.
    decode: converts token ids to text.
  """
  lines = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    inside = segment_id == index
    lines.append(f'{reward[inside].sum():+6.2f}  {decode(ids[inside].tolist()).strip()}')
  return lines


def print_segments(annotated: AnnotatedResponse) -> None:
  """Prints the last message of the prompt, and a table with a line per segment.

  The entropy shown is that of the segment's first token, which is the one that began the segment.
  Control characters are escaped.
  """
  if annotated.prompt:
    log(f'\n{escape_control(annotated.prompt[-1]["content"])}')
  columns = {'score': 'score', 'normalized_score': 'normalised score', 'reward': 'reward'}
  names = [
    name
    for name in columns
    if any(getattr(segment, name) is not None for segment in annotated.segments)
  ]
  rows = []
  for segment in annotated.segments:
    entropy, *_ = segment.entropy
    numbers = [getattr(segment, name) for name in names]
    rows.append(
      [
        escape_control(segment.text.strip(' ')),
        str(len(segment.tokens)),
        '–' if entropy is None else f'{entropy:.2f}',
        *('–' if number is None else f'{number:+.3f}' for number in numbers),
      ]
    )
  table('', ['segment', 'tokens', 'entropy', *(columns[name] for name in names)], rows)


def escape_control(text: str, keep: str = '') -> str:
  """Returns the text with control characters escaped, except those in `keep`.

  A terminal would act on them: text of a model must not move its cursor or set its title.
  """
  return ''.join(
    c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in text
  )
