"""Loads functions of the user's by name and calls them; an error names the function and its cause.

`response_functions` calls those of responses, with what they ask for by name.
"""

import contextlib
import importlib
import inspect
import math
import numbers
import operator
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segjax.errors import UserError, excerpt, first_line

_LARGEST = float(np.finfo(np.float32).max)

# What a function of responses gets if it has a parameter of that name.
BY_NAME = ('row', 'messages', 'tokens', 'step')
_OF_RESPONSES = ('prompt', 'response')
# What each function of the user's is called with, by position.
PARAMETERS = {
  'reward_shaping.reward_fn': _OF_RESPONSES,
  'evaluate.gold_reward_fn': _OF_RESPONSES,
  'evaluate.credit_fn': _OF_RESPONSES,
  'evaluate.boundary_fn': ('token',),
  'reward.segmentation.boundary_fn': ('token',),
  'reward_model.segmentation.boundary_fn': ('token',),
}


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
  # Those of config.rewards have keys with names in them.
  parameters = PARAMETERS.get(key, _OF_RESPONSES if key.startswith('rewards:') else ())
  if parameters:
    _check_parameters(function, parameters, f'config.{key}={path!r}')
  return function


def _check_parameters(function: Callable[..., Any], parameters: tuple[str, ...], name: str) -> None:
  asked = asked_by_name(function) if parameters == _OF_RESPONSES else ()
  try:
    inspect.signature(function).bind(*parameters, **dict.fromkeys(asked))
  except TypeError as error:
    more = f' and, by name, any of {", ".join(BY_NAME)}' if parameters == _OF_RESPONSES else ''
    raise UserError(
      f'{name} is called with ({", ".join(parameters)}){more}, and takes other parameters '
      f'({error}); define it with these.'
    ) from error
  except ValueError:  # some functions written in C have no signature
    pass


def asked_by_name(function: Callable[..., Any]) -> tuple[str, ...]:
  """Returns those of BY_NAME that are parameters of a function."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):  # some functions written in C have no signature
    return ()
  keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  return tuple(n for n in BY_NAME if n in parameters and parameters[n].kind in keywords)


def load_token_function(path: str, key: str) -> Callable[[str], bool]:
  """Loads a function of a token's text that says whether a segment ends there.

  Calling what is returned raises UserError where the function raises.

  Raises:
    UserError: see `load_function`.
  """
  function = load_function(path, key)

  def ends(text: str) -> bool:
    with naming_errors(function, describe_call(function, f'the token {text!r}')):
      return bool(function(text))

  return ends


@contextlib.contextmanager
def naming_errors(function: Callable[..., Any], call: str) -> Iterator[None]:
  """Turns an exception of the user's function, of whatever class, into a UserError.

  Args:
    function: the function that is called inside.
    call: names it and what it is called on, see `describe_call`.
  """
  try:
    yield
  except (Exception, SystemExit) as error:
    code = getattr(inspect.unwrap(function), '__code__', None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
    location = f' in line {lines[-1]} of {Path(code.co_filename).name}' if lines else ''
    raise UserError(
      f'{call} raised {_summary(error)}{location}; correct the function (SEGJAX_TRACEBACK=1 shows '
      'the traceback).'
    ) from error


def describe_call(function: Callable[..., Any], subject: str) -> str:
  """Returns 'module:function on `subject`', for an error."""
  name = getattr(function, '__qualname__', None)
  return f'{f"{function.__module__}:{name}" if name else repr(function)} on {subject}'


def parse_number(value: Any, call: str, valid: str) -> float:
  """Returns what a function has returned as a number.

  Raises:
    UserError: it is not a number that float32 can hold; the message gives `call`, and asks for
      `valid`.
  """
  try:
    number = float(value) if isinstance(value, numbers.Real | np.bool_) else math.nan
  except OverflowError:
    number = math.inf
  if not abs(number) <= _LARGEST:
    raise UserError(f'{call} returned {excerpt(value)}; return {valid}')
  return number


def _summary(error: BaseException) -> str:
  """Returns the class of an error and the first line of its message."""
  name, line = type(error).__name__, first_line(error)
  return name if line == name else f'{name}: {line}'
