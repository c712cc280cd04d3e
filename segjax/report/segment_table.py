"""Prints responses on the console: a paragraph with the reward of each segment, or a table."""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm.utils import disp_len, disp_trim

from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.report.console import LOG_WIDTH, log, table

_GREEN, _RED, _DIM, _NORMAL = '\033[32m', '\033[31m', '\033[2m', '\033[0m'


def print_response(texts: Sequence[str], segment_id: np.ndarray, reward: np.ndarray) -> None:
  """Prints a response in one paragraph, each segment with its reward behind it.

  On a terminal a segment is green if its reward is positive and red if it is negative. Control
  characters are escaped.

  Args:
    texts: the text that each token adds, [T].
    segment_id: the segment of each token, -1 outside, [T].
    reward: reward of each token, [T]; the sum over a segment is shown.
  """
  segments = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    inside = np.flatnonzero(segment_id == index)
    segments.append((''.join(texts[i] for i in inside), float(reward[inside].sum())))
  log(format_paragraph(segments, indent=4) if segments else '    (no content)')


def format_paragraph(segments: Sequence[tuple[str, float]], indent: int) -> str:
  """Returns segments, (text, reward), in lines as wide as the terminal, 100 in a log file."""
  on_terminal = sys.stdout.isatty()
  width = shutil.get_terminal_size().columns if on_terminal else LOG_WIDTH
  is_coloured = on_terminal and 'NO_COLOR' not in os.environ  # https://no-color.org
  lines, column, space = [' ' * indent], indent, ''
  for word in _words(segments, max(width - indent, 8)):
    if word.text.isspace():
      space = word.text
      continue
    size = disp_len(word.text)
    is_full = (space or word.may_break) and column + len(space) + size > width
    if '\n' in space or (is_full and column > indent):
      lines.append(' ' * indent)
      column = indent
    if column == indent:
      space = ''
    styled = f'{word.style}{word.text}{_NORMAL}' if word.style and is_coloured else word.text
    lines[-1] += space + styled
    column, space = column + len(space) + size, ''
  return '\n'.join(lines)


class _Word(NamedTuple):
  """A word, white space or the reward of a segment; a part of a long word may begin a line."""

  text: str
  style: str = ''
  may_break: bool = False


def _words(segments: Sequence[tuple[str, float]], width: int) -> Iterator[_Word]:
  for text, reward in segments:
    style = '' if not reward else _GREEN if reward > 0 else _RED
    words = text.rstrip()
    for piece in re.findall(r'\s+|\S+', words):
      if piece.isspace():
        yield _Word(piece)
        continue
      rest, is_part = escape_control(piece), False
      while rest:  # text without spaces, as in Chinese, is wider than a line
        part = disp_trim(rest, width)
        yield _Word(part, style, is_part)
        rest, is_part = rest[len(part) :], True
    yield _Word(' ')
    yield _Word(f'[{reward:+.2f}]', _DIM)
    if len(words) < len(text):
      yield _Word(text[len(words) :])


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
