"""Responses with coloured segments for a notebook, in the colours of report.html.

IPython is not needed: it shows what an object's `_repr_html_` returns.
"""

import functools
import html
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

from segjax.errors import UserError
from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.report.segment_table import escape_control

_QUANTILE = 0.95  # of the numbers' magnitudes: it has the full colour, as in report.html


class ColouredSegments:
  """Responses that a notebook shows with a colour per segment; see `show_segments`."""

  def __init__(self, responses: Sequence[AnnotatedResponse]):
    self.responses = responses

  def __repr__(self) -> str:
    return f'ColouredSegments({len(self.responses)} responses)'

  def _repr_html_(self) -> str:
    numbers = [_shown_number(s) for r in self.responses for s in r.segments]
    values = sorted(abs(number) for number in numbers if number is not None)
    entropies = [h for r in self.responses for s in r.segments for h in s.entropy if h is not None]
    full = values[int(_QUANTILE * (len(values) - 1))] if values else max(entropies, default=0.0)
    shown = ''.join(_response(response, full or 1.0, bool(values)) for response in self.responses)
    return f'<style>{_style()}</style><div class="segjax-segments">{shown}</div>'


def show_segments(responses: Any) -> ColouredSegments:
  """Returns responses that a notebook shows with a colour per segment, as the last value of a cell.

    segjax.show_segments(judge.score([chat]))

  A segment is blue if its reward is positive and orange if it is negative, the stronger the larger
  it is among all these responses; its number stands behind it. Without rewards these are normalised
  scores, without a normaliser raw ones. Responses without scores, of `Policy.segment`, have tokens
  that are the more purple the larger their entropy; the number is that of the segment's first one.

  Args:
    responses: of `RewardModel.score` or `Policy.segment`, or one of them.

  Raises:
    UserError: the argument is something else.
  """
  # `Any`, so that other types reach the check here.
  responses = [responses] if isinstance(responses, AnnotatedResponse) else list(responses)
  for response in responses:
    if not isinstance(response, AnnotatedResponse):
      raise UserError(
        f'show_segments got {type(response).__name__}; give what policy.segment or '
        'reward_model.score returns.'
      )
  return ColouredSegments(responses)


def _shown_number(segment: Segment) -> float | None:
  """Returns the number that a segment's colour shows: the first that is known, as in page.js."""
  numbers = (segment.reward, segment.normalized_score, segment.score)
  return next((number for number in numbers if number is not None), None)


def _response(response: AnnotatedResponse, full: float, has_numbers: bool) -> str:
  prompt = ''.join(
    f'<p><b>{_text(message["role"])}</b> {_text(message["content"])}</p>'
    for message in response.prompt
  )
  parts = [_segment(segment, full, has_numbers) for segment in response.segments]
  text = ''.join(parts) or '<span class="empty">no content</span>'
  return f'<div class="prompt">{prompt}</div><div class="text">{text}</div>'


def _segment(segment: Segment, full: float, has_numbers: bool) -> str:
  # The space before a segment is not coloured: at the end of a line it would show as a stripe.
  stripped = segment.text.removeprefix(' ')
  space = segment.text[: len(segment.text) - len(stripped)]
  number = _shown_number(segment)
  if has_numbers:
    attributes, inner = '', _text(stripped)
    if number is not None:
      sign = 'down' if number < 0 else 'up'
      attributes = f' {sign}" style="--size: {_share(abs(number), full)}'
    label = '' if number is None else f'{number:+.2f}'
  else:
    attributes, inner = (
      '',
      ''.join(
        _token(text, entropy, full)
        for text, entropy in zip(segment.tokens, segment.entropy, strict=True)
      ),
    )
    space, entropy = '', segment.entropy[0] if segment.entropy else None
    label = '' if entropy is None else f'{entropy:.2f}'
  value = f'<small class="value">{label}</small>' if label else ''
  return f'{space}<span class="segment{attributes}">{inner}{value}</span>'


def _token(text: str, entropy: float | None, full: float) -> str:
  if entropy is None:
    return f'<span class="token">{_text(text)}</span>'
  size = _share(entropy, full)
  return f'<span class="token hot" style="--size: {size}">{_text(text)}</span>'


def _share(value: float, full: float) -> str:
  return f'{min(1.0, max(0.0, value / full)):.3f}'


def _text(text: str) -> str:
  """Returns text of a model as HTML that cannot become markup."""
  return html.escape(escape_control(text, keep='\n'))


@functools.cache
def _style() -> str:
  """Returns the rules of report.html's segments, nested so that they change nothing else."""
  folder = importlib.resources.files('segjax.report') / 'template'
  rules = (folder / 'segments.css').read_text(encoding='utf-8')
  page = (folder / 'page.css').read_text(encoding='utf-8')
  # The first of each is that of the light scheme; a notebook's own colours are kept elsewhere.
  colours = ' '.join(re.search(rf'--{name}: [^;]+;', page)[0] for name in ('pos', 'neg', 'entropy'))
  inherited = (
    '--ink: currentColor; --muted: color-mix(in srgb, currentColor 65%, transparent); '
    '--card: transparent;'
  )
  return f'.segjax-segments {{ {colours} {inherited}\n{rules}}}'
