"""Prints responses on the console: a paragraph with the reward of each segment, or a table."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm.utils import disp_len, disp_trim

from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.report.console import console_width, log

_NUMBERS = {'score': 'score', 'normalized_score': 'normalised score', 'reward': 'reward'}
_MIN_WIDTH = 20  # columns of text, also beside numbers on a terminal that is too narrow
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
  width = max(console_width() - indent, _MIN_WIDTH)
  words = []
  for text, reward in segments:
    stripped = text.rstrip()
    words += _words(stripped, width, '' if not reward else _GREEN if reward > 0 else _RED)
    # Space at the segment's end follows its reward.
    words += [_Word(' '), _Word(f'[{reward:+.2f}]', _DIM), _Word(text[len(stripped) :])]
  return '\n'.join(' ' * indent + line for line in _fill(words, width))


class _Word(NamedTuple):
  """A word, white space or the reward of a segment; a part of a long word may begin a line."""

  text: str
  style: str = ''
  may_break: bool = False


def _words(text: str, width: int, style: str = '') -> Iterator[_Word]:
  for piece in re.findall(r'\s+|\S+', text):
    if piece.isspace():
      yield _Word(piece)
      continue
    rest, is_part = escape_control(piece), False
    while rest:  # text without spaces, as in Chinese, is wider than a line
      part = disp_trim(rest, width)
      yield _Word(part, style, is_part)
      rest, is_part = rest[len(part) :], True


def _fill(words: Sequence[_Word], width: int) -> list[str]:
  """Returns lines of words, at most `width` columns each; line breaks in the text are kept."""
  # https://no-color.org
  is_coloured = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
  lines, column, space = [''], 0, ''
  for word in words:
    if not word.text.strip():
      space += word.text
      continue
    size = disp_len(word.text)
    is_full = (space or word.may_break) and column + len(space) + size > width
    if '\n' in space or (is_full and column):
      lines.append('')
      column = 0
    if not column:
      space = ''
    styled = f'{word.style}{word.text}{_NORMAL}' if word.style and is_coloured else word.text
    lines[-1] += space + styled
    column, space = column + len(space) + size, ''
  return lines


def print_segments(annotated: AnnotatedResponse) -> None:
  """Prints the last message of the prompt, and a table with the numbers and text of each segment.

  The entropy shown is that of the segment's first token, which is the one that began the segment.
  The text comes last and is wrapped, so that a long one hides no number. Control characters are
  escaped.
  """
  if annotated.prompt:
    log(f'\n{escape_control(annotated.prompt[-1]["content"])}')
  names = [
    name
    for name in _NUMBERS
    if any(getattr(segment, name) is not None for segment in annotated.segments)
  ]
  parts = list(dict.fromkeys(part for x in annotated.segments for part in x.parts or ()))
  rows = [['tokens', 'entropy', *(_NUMBERS[name] for name in names), *parts]]
  for segment in annotated.segments:
    entropy, *_ = segment.entropy
    numbers = [getattr(segment, name) for name in names]
    numbers += [(segment.parts or {}).get(part) for part in parts]
    rows.append(
      [
        str(len(segment.tokens)),
        '–' if entropy is None else f'{entropy:.2f}',
        *('–' if number is None else f'{number:+.3f}' for number in numbers),
      ]
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  indent = sum(width + 2 for width in widths)
  text_width = max(console_width() - indent, _MIN_WIDTH)
  lines = []
  for row, text in zip(rows, ['segment', *(s.text for s in annotated.segments)], strict=True):
    cells = '  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    first, *more = _fill(list(_words(escape_control(text.strip(' ')), text_width)), text_width)
    lines += [f'{cells}  {first}'.rstrip(), *(' ' * indent + line for line in more)]
  widest = max(map(disp_len, lines))
  log('\n'.join([lines[0], '─' * widest, *lines[1:], '']))


def escape_control(text: str, keep: str = '') -> str:
  """Returns the text with control characters escaped, except those in `keep`.

  A terminal would act on them: text of a model must not move its cursor or set its title.
  """
  return ''.join(
    c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in text
  )
