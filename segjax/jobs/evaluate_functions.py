"""Loads the user's functions that config.evaluate names."""

from collections.abc import Callable

from segjax.config.settings import Evaluate
from segjax.errors import UserError
from segjax.train.custom_reward import (
  load_number_function,
  load_numbers_function,
  load_token_function,
)


def load_gold_and_boundary(
  settings: Evaluate,
) -> tuple[Callable | None, Callable | None]:
  """Loads the gold and boundary functions of config.evaluate; None for those that are not set.

  Raises:
    UserError: a function cannot be loaded, or takes other parameters.
  """
  gold = boundary = None
  if settings.gold_reward_fn:
    gold = load_number_function(settings.gold_reward_fn, 'evaluate.gold_reward_fn')
  if settings.boundary_fn:
    boundary = load_token_function(settings.boundary_fn, 'evaluate.boundary_fn')
  return gold, boundary


def load_credit(
  settings: Evaluate,
) -> tuple[Callable[[str], bool], Callable[[str, str], list[float]]]:
  """Loads what says where a clause ends, and what each clause of a response is truly worth.

  Raises:
    UserError: one of them is not set or cannot be loaded.
  """
  for key in ('credit_fn', 'boundary_fn'):
    if not getattr(settings, key):
      raise UserError(
        f'config.evaluate.{key} is empty, and the true credit of clauses needs credit_fn and '
        "boundary_fn; set it to 'module:function'."
      )
  return (
    load_token_function(settings.boundary_fn, 'evaluate.boundary_fn'),
    load_numbers_function(settings.credit_fn, 'evaluate.credit_fn'),
  )
