"""Limits what a chat template may make of a conversation: time, and the size of values.

The calls come from `segjax.data.template_sandbox`, before an operation runs that makes a large
value.
"""

import contextvars
import re
import time
from collections.abc import Iterable, MappingView
from typing import Any

import jinja2

# CPU time of a rendering and characters of all values that it makes; more per character of the
# conversation.
_SECONDS, _SECONDS_PER_CHARACTER = 0.5, 1e-6
_WEIGHT, _WEIGHT_PER_CHARACTER = 20_000_000, 100
_MAX_ELEMENTS = 100_000  # of a list, with the lists in it, that is turned into text
_MAX_BITS = 100_000  # of a number
_TICKS = 64  # loop iterations between two looks at the clock
_CONTAINERS = (list, tuple, dict)
# Filters and methods of strings whose result grows with a number.
_PADDING = (
  *('batch', 'center', 'expandtabs', 'indent', 'ljust', 'rjust'),
  *('round', 'slice', 'tojson', 'wordwrap', 'zfill'),
)
# Filters that take up to 0.4 microseconds a character; others take a hundredth of it.
_SLOW = (
  *('groupby', 'sort', 'striptags', 'title', 'unique'),
  *('urlize', 'wordcount', 'wordwrap', 'xmlattr'),
)


class TemplateLimitError(Exception):
  """The template takes too much time or memory."""


class TemplateTimeError(TemplateLimitError):
  """The template takes too much time."""


class Meter:
  """Measures one rendering."""

  def __init__(self, size: int):
    self._deadline = time.thread_time() + _SECONDS + size * _SECONDS_PER_CHARACTER
    self.weight = _WEIGHT + size * _WEIGHT_PER_CHARACTER  # that is left
    self._ticks = 0

  def tick(self) -> None:
    """Counts an iteration."""
    self._ticks += 1
    if self._ticks % _TICKS == 0:
      self.look()

  def look(self) -> None:
    """Raises TemplateTimeError after the deadline."""
    if time.thread_time() > self._deadline:
      raise TemplateTimeError(f'it takes over {_SECONDS} seconds; is there a loop without end?')

  def add(self, weight: int) -> None:
    """Counts a value that is about to be made."""
    self.weight -= weight
    if self.weight < 0:
      raise TemplateLimitError(f'it makes values of more than {_WEIGHT:,} characters')


METER: contextvars.ContextVar[Meter] = contextvars.ContextVar('meter')


def comparable(value: Any) -> Any:
  """Counts the elements of a list that is compared with another value; returns it."""
  if isinstance(value, _CONTAINERS):
    METER.get().add(weigh(value))
  return value


def check_call(name: str, args: list[Any]) -> None:
  """Counts what a filter or method reads, and its result where that is larger."""
  meter = METER.get()
  meter.look()
  read = sum(len(a) for a in args if isinstance(a, str | list | tuple | dict))
  meter.add(read * (20 if name in _SLOW else 1))
  if name == 'join' and len(args) > 1:
    separator, items = sorted(args[:2], key=lambda a: not isinstance(a, str))
    meter.add(weigh(items) + len(separator) * len(items))
  elif name == 'replace' and len(args) > 2 and all(isinstance(a, str) for a in args[:3]):
    text, old, new = args[:3]
    meter.add(text.count(old) * len(new))
  elif name == 'format':
    meter.add(_format_weight(args))
  elif name in ('string', 'pprint', 'tojson'):
    read = weigh(args)
    meter.add(read)
  if name in _PADDING:
    numbers = [abs(a) for a in args if isinstance(a, int)]
    meter.add(max(numbers, default=0) * max(1, read))


def _format_weight(args: list[Any]) -> int:
  """Returns a bound of the size of args[0] formatted with the others."""
  template = args[0] if isinstance(args[0], str) else ''
  numbers = [int(digits[:12]) for digits in re.findall(r'\d{4,}', template)]
  numbers += [abs(a) for a in _leaves(args) if isinstance(a, int)] if '*' in template else []
  numbers += [abs(a) for a in args[1:] if isinstance(a, int) and '{' in template]
  fields = 1 + template.count('%') + template.count('{')
  return fields * (max(numbers, default=0) + weigh(args))


def check_operator(operator: str, left: Any, right: Any) -> None:
  """Counts the result of an operator."""
  meter, sizes = METER.get(), [size(value) for value in (left, right)]
  if isinstance(left, int) and isinstance(right, int):
    bits = left.bit_length() * right if operator == '**' else left.bit_length() + right.bit_length()
    if bits > _MAX_BITS:
      raise TemplateLimitError(f'it makes a number of more than {_MAX_BITS:,} bits')
  elif operator == '%' and isinstance(left, str):
    meter.add(_format_weight([left, right]))
  elif operator == '*':
    meter.add(max(sizes) * max((v for v in (left, right) if isinstance(v, int)), default=0))
  else:
    meter.add(sum(sizes))


def size(value: Any) -> int:
  """Returns the size of a value, without what its elements refer to, in characters."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, _CONTAINERS):
    return 8 * len(value)
  return 0


def weigh(value: Any) -> int:
  """Returns the size of a value with all elements, as often as they are shown.

  Raises:
    TemplateLimitError: a list that holds itself many times over.
  """
  return sum(size(leaf) + 1 for leaf in _leaves([value]))


def _leaves(values: Iterable[Any]) -> Iterable[Any]:
  """Yields values, and those in them."""
  stack = list(values)
  for _ in range(_MAX_ELEMENTS):
    if not stack:
      return
    value = stack.pop()
    yield value
    if isinstance(value, dict):
      stack.extend((*value.keys(), *value.values()))
    elif isinstance(value, list | tuple | MappingView):
      stack.extend(value)
    elif isinstance(value, jinja2.utils.Namespace):
      raise TemplateLimitError('it turns a namespace into text')
  raise TemplateLimitError(f'it makes a list of more than {_MAX_ELEMENTS:,} elements')
