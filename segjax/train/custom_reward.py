"""Loads a user's reward function, calls it for each response and assigns the result to tokens.

`reward_shaping` mixes these rewards with those of the reward model.
"""

import bisect
import functools
import importlib
import inspect
import math
import numbers
import operator
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from segjax.data.token_texts import token_texts
from segjax.errors import UserError, excerpt, first_line

_LARGEST = float(np.finfo(np.float32).max)
_VALID = 'a finite number, a list of one per token, or a list of (end, number).'

# What each function of the user's is called with, by position.
PARAMETERS = {
  'reward_shaping.reward_fn': ('prompt', 'response'),
  'evaluate.gold_reward_fn': ('prompt', 'response'),
  'evaluate.credit_fn': ('prompt', 'response'),
  'evaluate.boundary_fn': ('token',),
  'reward.segmentation.boundary_fn': ('token',),
  'reward_model.segmentation.boundary_fn': ('token',),
}

# (prompts, response_ids [B, T], response_mask [B, T]) -> reward of each token [B, T].
CustomReward = Callable[[Sequence[str], np.ndarray, np.ndarray], np.ndarray]


def load_function(path: str, key: str) -> Callable[..., Any]:
  """Imports the function named by 'module:function'.

  Args:
    path: value of config.`key`.
    key: the config key, for the error.

  Raises:
    UserError: it cannot be imported, is not callable, or does not take PARAMETERS.
  """
  module, _, name = path.partition(':')
  try:
    function = operator.attrgetter(name)(importlib.import_module(module))
  except (Exception, SystemExit) as error:  # whatever a user's module does while it is imported
    raise UserError(
      f"config.{key}={path!r} cannot be loaded ({_summary(error)}); give 'module:function'."
    ) from error
  if not callable(function):
    raise UserError(
      f'config.{key}={path!r} is a {type(function).__name__} and cannot be called; name a function.'
    )
  parameters = PARAMETERS.get(key, ())
  if parameters and not _accepts(function, parameters):
    raise UserError(
      f'config.{key}={path!r} is called with ({", ".join(parameters)}), and takes other '
      'parameters; define it with these.'
    )
  return function


def _accepts(function: Callable[..., Any], parameters: tuple[str, ...]) -> bool:
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # some functions written in C have no signature
    return True
  extra = {'tokens': ()} if 'tokens' in signature.parameters else {}  # see token_rewards
  try:
    signature.bind(*parameters, **extra)
  except TypeError:
    return False
  return True


def call_function(function: Callable[..., Any], call: str, *arguments: Any, **options: Any) -> Any:
  """Calls a function of the user's.

  Args:
    function: the function.
    call: names it and what it is called on, see `describe_call`.
    arguments: of the function.
    options: of the function.

  Raises:
    UserError: the function raised an exception, of whatever class.
  """
  try:
    return function(*arguments, **options)
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)[1:]
    code = getattr(inspect.unwrap(function), '__code__', None)
    lines = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
    location = f' in line {lines[-1]} of {Path(code.co_filename).name}' if lines else ''
    raise UserError(
      f'{call} raised {_summary(error)}{location}; correct the function (SEGJAX_TRACEBACK=1 shows '
      'the traceback).'
    ) from error


def load_number_function(path: str, key: str) -> Callable[[str, str], float]:
  """Loads a function of (prompt, response) that returns a number, such as a gold reward.

  What is returned raises UserError where the function raises or returns something else.

  Raises:
    UserError: see `load_function`.
  """
  function = load_function(path, key)

  def number(prompt: str, response: str) -> float:
    call = describe_call(function, f'the prompt {excerpt(prompt)}')
    return _parse_number(call_function(function, call, prompt, response), call, 'a finite number.')

  return number


def load_numbers_function(path: str, key: str) -> Callable[[str, str], list[float]]:
  """Loads a function of (prompt, response) that returns numbers, such as one for each clause.

  What is returned raises UserError where the function raises or returns something else.

  Raises:
    UserError: see `load_function`.
  """
  function = load_function(path, key)

  def numbers(prompt: str, response: str) -> list[float]:
    call = describe_call(function, f'the prompt {excerpt(prompt)}')
    returned = call_function(function, call, prompt, response)
    if not isinstance(returned, list | tuple):
      raise UserError(f'{call} returned {excerpt(returned)}; return a list of finite numbers.')
    return [_parse_number(value, call, 'a list of finite numbers.') for value in returned]

  return numbers


def load_token_function(path: str, key: str) -> Callable[[str], bool]:
  """Loads a function of a token's text that says whether a segment ends there.

  Calling what is returned raises UserError where the function raises.

  Raises:
    UserError: see `load_function`.
  """
  function = load_function(path, key)

  def ends(text: str) -> bool:
    call = describe_call(function, f'the token {text!r}')
    return call_function(bool, call, call_function(function, call, text))

  return ends


def describe_call(function: Callable[..., Any], subject: str) -> str:
  """Returns 'module:function on `subject`', for an error."""
  name = getattr(function, '__qualname__', None)
  return f'{f"{function.__module__}:{name}" if name else repr(function)} on {subject}'


def _summary(error: BaseException) -> str:
  """Returns the class of an error and the first line of its message."""
  name, line = type(error).__name__, first_line(error)
  return name if line == name else f'{name}: {line}'


def load_custom_reward(path: str, decode: Callable[[Any], str]) -> CustomReward | None:
  """Loads config.reward_shaping.reward_fn; None where `path` is empty.

  Args:
    path: 'module:function'.
    decode: maps token ids to text, without special tokens.

  Raises:
    UserError: the function cannot be loaded.
  """
  if not path:
    return None
  function = load_function(path, 'reward_shaping.reward_fn')
  return functools.partial(token_rewards, function, decode=decode)


def token_rewards(
  function: Callable[..., Any],
  prompts: Sequence[str],
  response_ids: Int[np.ndarray, 'B T'],
  response_mask: Bool[np.ndarray, 'B T'],
  decode: Callable[[Any], str],
) -> Float32[np.ndarray, 'B T']:
  """Calls `function` for each response; returns its rewards token by token, 0 elsewhere.

  It is called with (prompt, response), the response's text without special tokens, and also with
  `tokens=[text that each token adds]`, which join to the response, if it has a parameter of that
  name. It may return

    a number               reward of the response, assigned to its last token;
    [number, ...]          one per token, the stop token included;
    [(end, number), ...]   earned by the text up to character `end`, from 1 to len(response), and
                           assigned to the token that completes response[:end]; rewards at the
                           same token add up.

  An empty list is no reward. The function is not called for an empty response, whose reward is 0.

  Args:
    function: the user's function.
    prompts: text of each row's prompt, passed through.
    response_ids: tokens of the responses.
    response_mask: True on the response, stop token included.
    decode: maps token ids to text, without special tokens.

  Raises:
    UserError: the function returned something else, a number that float32 cannot hold,
      or it raised an exception; the message names the function and the prompt.
  """
  rewards = np.zeros(response_ids.shape, np.float32)
  takes_tokens = _has_parameter(function, 'tokens')
  for row, (prompt, ids, mask) in enumerate(zip(prompts, response_ids, response_mask, strict=True)):
    positions = np.flatnonzero(mask)
    if not positions.size:
      continue
    call = describe_call(function, f'the prompt {excerpt(prompt)}')
    text = decode(ids[positions])
    extra = {'tokens': token_texts(ids[positions].tolist(), decode)} if takes_tokens else {}
    returned = call_function(function, call, prompt, text, **extra)
    rewards[row, positions] = _assign(returned, text, ids[positions], decode, call)
  return rewards


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
  try:
    return name in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some functions written in C have no signature
    return False


def _assign(
  returned: Any, text: str, ids: np.ndarray, decode: Callable[[Any], str], call: str
) -> np.ndarray:
  """Returns the value of the user's function as a reward for each of the tokens `ids`."""
  rewards = np.zeros(len(ids))
  if isinstance(returned, np.ndarray):
    returned = returned.tolist()
  if not isinstance(returned, list | tuple):
    rewards[-1] = _parse_number(returned, call)
  elif any(isinstance(item, list | tuple) for item in returned):
    prefix = functools.cache(lambda count: decode(ids[:count]))
    for item in returned:
      end, value = _parse_pair(item, text, call)
      rewards[_completing_token(end, text, len(ids), prefix)] += value
  elif len(returned) == len(ids):
    rewards[:] = [_parse_number(value, call) for value in returned]
  elif returned:
    raise UserError(
      f'{call} returned {len(returned)} numbers for {len(ids)} tokens; return one for each (the '
      'stop token counts), or pairs of (end, number).'
    )
  return rewards


def _completing_token(end: int, text: str, count: int, prefix: Callable[[int], str]) -> int:
  """Returns the first token after which text[:end] is complete, to its last character."""
  # decode writes the bytes of an unfinished character as a character of its own, so that texts are
  # compared, not their lengths.
  return bisect.bisect_left(
    range(1, count), True, key=lambda number: prefix(number)[:end] == text[:end]
  )


def _parse_pair(item: Any, text: str, call: str) -> tuple[int, float]:
  if not isinstance(item, list | tuple) or len(item) != 2:
    raise UserError(
      f'{call} returned {excerpt(item)} among pairs of (end, number); return such pairs only.'
    )
  end, value = item
  is_integer = isinstance(end, numbers.Integral) and not isinstance(end, bool)
  if not is_integer or not 1 <= end <= len(text):
    raise UserError(
      f'{call} returned the pair {excerpt(item)}; its first element must be an integer from 1 to '
      f'{len(text)}, the number of characters of the response.'
    )
  return int(end), _parse_number(value, call)


def _parse_number(value: Any, call: str, valid: str = _VALID) -> float:
  try:
    number = float(value) if isinstance(value, numbers.Real | np.bool_) else math.nan
  except OverflowError:
    number = math.inf
  if not abs(number) <= _LARGEST:
    raise UserError(f'{call} returned {excerpt(value)}; return {valid}')
  return number
