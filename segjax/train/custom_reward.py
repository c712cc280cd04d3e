"""A user's rule or process reward: loaded by name, called per response, placed on its tokens.

Not here: the mixing with the reward model.
"""

import bisect
import functools
import importlib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from segjax.data.files import excerpt
from segjax.errors import UserError

_LARGEST = float(np.finfo(np.float32).max)


def load_function(path: str, key: str) -> Callable[..., Any]:
  """The function that 'module:function' names.

  Args:
    path: what config.`key` says.
    key: for the error.

  Raises:
    ValueError: it cannot be imported, or is no function.
  """
  module, _, name = path.partition(':')
  try:
    function = operator.attrgetter(name)(importlib.import_module(module))
  except Exception as error:  # whatever a user's module does while it is imported
    raise UserError(
      f"config.{key}={path!r} cannot be loaded ({error}); it is 'module:function'."
    ) from error
  if not callable(function):
    raise UserError(
      f'config.{key}={path!r} is a {type(function).__name__} and cannot be called; name a function.'
    )
  return function


def token_rewards(
  function: Callable[..., Any],
  prompts: Sequence[str],
  response_ids: Int[np.ndarray, 'B T'],
  response_mask: Bool[np.ndarray, 'B T'],
  decode: Callable[[Any], str],
) -> Float32[np.ndarray, 'B T']:
  """What `function` gives each response, token by token, and 0 outside the responses.

  It is called with (prompt, response), the response's text without special tokens, and with
  `tokens=[text of each token]` too if it has a parameter of that name. It may return

    a number               the reward of the whole: at the response's last token;
    [number, ...]          one per token, the stop token included;
    [(end, number), ...]   earned by the text up to the character `end`, from 1 to len(response): at
                           the token that completes response[:end]; several at one token add up.

  An empty list is no reward. An empty response has none either, and is not asked about.

  Args:
    function: the user's.
    prompts: one text for each row, handed through.
    response_ids: tokens of the responses.
    response_mask: True on the response, stop token included.
    decode: token ids to text, special tokens left out.

  Raises:
    ValueError: something else was returned, or a number that float32 cannot hold; names the
      function and the prompt. What the function itself raises goes through, with a note of both.
  """
  rewards = np.zeros(response_ids.shape, np.float32)
  is_shown_tokens = _has_parameter(function, 'tokens')
  text_of = functools.cache(lambda token: decode([token]))
  for row, (prompt, ids, mask) in enumerate(zip(prompts, response_ids, response_mask, strict=True)):
    at = np.flatnonzero(mask)
    if not at.size:
      continue
    where = f'{_name(function)} on the prompt {excerpt(prompt)}'
    text = decode(ids[at])
    more = {'tokens': [text_of(int(i)) for i in ids[at]]} if is_shown_tokens else {}
    try:
      found = function(prompt, text, **more)
    except Exception as error:
      error.add_note(f'raised by {where}')
      raise
    rewards[row, at] = _placed(found, text, ids[at], decode, where)
  return rewards


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
  try:
    return name in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some functions written in C have no signature
    return False


def _placed(found: Any, text: str, ids: np.ndarray, decode, where: str) -> np.ndarray:
  """What a function returned, as a reward for each of the tokens `ids`."""
  rewards = np.zeros(len(ids))
  if isinstance(found, np.ndarray):
    found = found.tolist()
  if not isinstance(found, list | tuple):
    rewards[-1] = _number(found, where)
  elif any(isinstance(item, list | tuple) for item in found):
    prefix = functools.cache(lambda count: decode(ids[:count]))
    for item in found:
      end, value = _pair(item, text, where)
      rewards[_completing(end, text, len(ids), prefix)] += value
  elif len(found) == len(ids):
    rewards[:] = [_number(value, where) for value in found]
  elif found:
    raise UserError(
      f'{where} returned {len(found)} numbers for {len(ids)} tokens; return one for each (the stop '
      'token counts), or pairs of (end, number).'
    )
  return rewards


def _completing(end: int, text: str, count: int, prefix: Callable[[int], str]) -> int:
  """The first token after which text[:end] is complete; half a character does not count."""
  # decode writes the bytes of an unfinished character as a character of its own, so that texts are
  # compared, not their lengths.
  return bisect.bisect_left(
    range(1, count), True, key=lambda number: prefix(number)[:end] == text[:end]
  )


def _pair(item: Any, text: str, where: str) -> tuple[int, float]:
  if not isinstance(item, list | tuple) or len(item) != 2:
    raise UserError(f'{where} returned {excerpt(item)} among pairs of (end, number).')
  end, value = item
  is_whole = isinstance(end, numbers.Integral) and not isinstance(end, bool)
  if not is_whole or not 1 <= end <= len(text):
    raise UserError(
      f'{where} returned the pair {excerpt(item)}; its first must be a whole number from 1 to '
      f'{len(text)}, as many characters as the response has.'
    )
  return int(end), _number(value, where)


def _number(value: Any, where: str) -> float:
  try:
    number = float(value) if isinstance(value, numbers.Real | np.bool_) else math.nan
  except OverflowError:
    number = math.inf
  if not abs(number) <= _LARGEST:
    raise UserError(
      f'{where} returned {excerpt(value)}; return a finite number, a list of one per token, or a '
      'list of (end, number).'
    )
  return number


def _name(function: Callable[..., Any]) -> str:
  name = getattr(function, '__qualname__', None)
  return f'{function.__module__}:{name}' if name else repr(function)
