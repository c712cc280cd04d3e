"""Loads the user's functions that config.evaluate names."""

from collections.abc import Callable
from typing import Any

from segjax.config.settings import Evaluate, Settings
from segjax.errors import UserError
from segjax.train import custom_reward
from segjax.train.custom_reward import Gold
from segjax.train.response_functions import Responses
from segjax.train.user_functions import load_token_function


def load_gold(s: Settings, decode: Callable[[Any], str]) -> Gold | None:
  """Loads config.evaluate.gold_reward_fn; None if it is not set.

  Args:
    s: names the function, and says in reward_shaping how functions are called.
    decode: maps token ids to text, without special tokens.

  Raises:
    UserError: the function cannot be loaded, or takes other parameters.
  """
  path = s.evaluate.gold_reward_fn
  return custom_reward.load_gold(path, s.reward_shaping, decode) if path else None


def load_boundary(settings: Evaluate) -> Callable[[str], bool] | None:
  """Loads config.evaluate.boundary_fn, which says where a segment ends; None if it is not set.

  Raises:
    UserError: the function cannot be loaded, or takes other parameters.
  """
  path = settings.boundary_fn
  return load_token_function(path, 'evaluate.boundary_fn') if path else None


def check_credit(settings: Evaluate) -> None:
  """Checks that there are functions of where a clause ends, and of what each is truly worth.

  Raises:
    UserError: one of them is not set.
  """
  for key in ('credit_fn', 'boundary_fn'):
    if not getattr(settings, key):
      raise UserError(
        f'config.evaluate.{key} is empty, and the true credit of clauses needs credit_fn and '
        "boundary_fn; set it to 'module:function'."
      )


def load_credit(
  s: Settings, decode: Callable[[Any], str]
) -> Callable[[Responses], list[list[float]]]:
  """Loads config.evaluate.credit_fn, as `load_gold`.

  Raises:
    UserError: the function cannot be loaded, or takes other parameters.
  """
  return custom_reward.load_credit(s.evaluate.credit_fn, s.reward_shaping, decode)
