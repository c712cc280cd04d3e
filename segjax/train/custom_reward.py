"""What functions of the user's return for responses: rewards of tokens, gold rewards, credits.

`response_functions` calls them; `reward_shaping` mixes the rewards with those of the reward model.
"""

import bisect
import dataclasses
import itertools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from segjax.config.reward_lines import REWARD_FN, RewardLine
from segjax.config.settings import RewardShaping
from segjax.errors import UserError, excerpt
from segjax.train.response_functions import Response, ResponseFunction, Responses, Results
from segjax.train.user_functions import load_function, parse_number

_VALID = 'a finite number, a list of one per token, or a list of (end, number).'

TokenReward = tuple[int, float]  # index of a token of the response, what is added to its reward
CustomReward = Callable[[Responses], Results]  # values: a list of TokenReward for each response
Gold = Callable[[Responses], list[float]]


def load_custom_reward(shaping: RewardShaping, decode: Callable[[Any], str]) -> CustomReward | None:
  """Loads reward_shaping.reward_fn, see `parse_token_rewards`; None without one.

  Args:
    shaping: names the function, and says how it is called.
    decode: maps token ids to text, without special tokens.

  Raises:
    UserError: the function cannot be loaded.
  """
  path, key = shaping.reward_fn, 'reward_shaping.reward_fn'
  return _load(path, key, parse_token_rewards, decode, shaping) if path else None


def load_listed_functions(
  lines: Iterable[RewardLine], shaping: RewardShaping, decode: Callable[[Any], str]
) -> dict[str, CustomReward]:
  """Loads the functions of config.rewards by name, see `load_custom_reward`."""
  return {
    line.name: _load(line.fn, line.key, parse_token_rewards, decode, shaping) for line in lines
  }


def load_gold(path: str, shaping: RewardShaping, decode: Callable[[Any], str]) -> Gold:
  """Loads evaluate.gold_reward_fn, which returns a number for each response.

  Args:
    path: 'module:function'.
    shaping: says how functions are called; one that fails stops the run, as no number is a gold.
    decode: maps token ids to text, without special tokens.

  Raises:
    UserError: the function cannot be loaded.
  """

  def parse(returned: Any, response: Response) -> float:
    return parse_number(returned, response.call, 'a finite number.')

  function = _load(path, 'evaluate.gold_reward_fn', parse, decode, _stopping(shaping))
  return lambda responses: function(responses).values


def load_credit(
  path: str, shaping: RewardShaping, decode: Callable[[Any], str]
) -> Callable[[Responses], list[list[float]]]:
  """Loads evaluate.credit_fn, which returns a list of numbers for each response; see `load_gold`.

  Raises:
    UserError: the function cannot be loaded.
  """

  def parse(returned: Any, response: Response) -> list[float]:
    valid = 'a list of finite numbers.'
    if not isinstance(returned, list | tuple):
      raise UserError(f'{response.call} returned {excerpt(returned)}; return {valid}')
    return [parse_number(value, response.call, valid) for value in returned]

  function = _load(path, 'evaluate.credit_fn', parse, decode, _stopping(shaping))
  return lambda responses: function(responses).values


def _stopping(shaping: RewardShaping) -> RewardShaping:
  return dataclasses.replace(shaping, reward_fn_on_error='stop')


def _load(
  path: str,
  key: str,
  parse: Callable[[Any, Response], Any],
  decode: Callable[[Any], str],
  shaping: RewardShaping,
) -> ResponseFunction:
  function = load_function(path, key)
  return ResponseFunction(function, parse, decode, shaping, is_batch=path.endswith('_batch'))


def call_functions(
  functions: dict[str, CustomReward],
  responses: Responses,
  response_mask: Bool[np.ndarray, 'B T'],
  log: Callable[[str], None],
) -> tuple[dict[str, Float32[np.ndarray, 'B T']], int]:
  """Returns the rewards of each token by each function, and how many responses failed in all.

  Args:
    functions: by name of their part in the reward.
    responses: the responses.
    response_mask: see `token_rewards`.
    log: receives a warning of each function that failed.
  """
  rewards, failed = {}, 0
  for name, function in functions.items():
    results = function(responses)
    if results.failures:
      key = 'reward_shaping.reward_fn' if name == REWARD_FN else f'{name} of config.rewards'
      log(
        f'warning: {len(results.failures)} of {len(results.values)} responses have no reward by '
        f'{key}; the first: {results.failures[0]}'
      )
    failed += len(results.failures)
    rewards[name] = token_rewards(results.values, response_mask)
  return rewards, failed


def token_rewards(
  values: Sequence[Sequence[TokenReward] | None], response_mask: Bool[np.ndarray, 'B T']
) -> Float32[np.ndarray, 'B T']:
  """Returns the reward of each token, 0 where there is none.

  Args:
    values: rewards of tokens of each response; None for one without.
    response_mask: True on the tokens of the responses.
  """
  rewards = np.zeros(response_mask.shape)  # rounded once what belongs to a token is added up
  for row, mask, pairs in zip(rewards, response_mask, values, strict=True):
    positions = np.flatnonzero(mask)
    for token, value in pairs or ():
      row[positions[token]] += value
  return rewards.astype(np.float32)


def parse_token_rewards(returned: Any, response: Response) -> list[TokenReward]:
  """Returns as rewards of tokens what the user's function has returned for a response.

    a number               reward of the response, assigned to its last token;
    [number, ...]          one per token, the stop token included;
    [(end, number), ...]   earned by the text up to character `end`, from 1 to len(response), and
                           assigned to the token that completes response[:end]; rewards at the
                           same token add up.

  An empty list is no reward.

  Raises:
    UserError: it is something else, or a number that float32 cannot hold.
  """
  call, last = response.call, len(response.ids) - 1
  if isinstance(returned, np.ndarray):
    returned = returned.tolist()
  if not isinstance(returned, list | tuple):
    return [(last, parse_number(returned, call, _VALID))]
  if any(isinstance(item, list | tuple) for item in returned):
    pairs = [_parse_pair(item, response) for item in returned]
    # Of an unfinished character at the end, the last token completes what there is of it.
    ends = list(itertools.accumulate(map(len, response.tokens[:-1])))
    return [(bisect.bisect_left(ends, end), value) for end, value in pairs]
  if returned and len(returned) != len(response.ids):
    raise UserError(
      f'{call} returned {len(returned)} numbers for {len(response.ids)} tokens; return one for '
      'each (the stop token counts), or pairs of (end, number).'
    )
  return list(enumerate(parse_number(value, call, _VALID) for value in returned))


def _parse_pair(item: Any, response: Response) -> tuple[int, float]:
  call, length = response.call, len(response.text)
  if not isinstance(item, list | tuple) or len(item) != 2:
    raise UserError(
      f'{call} returned {excerpt(item)} among pairs of (end, number); return such pairs only.'
    )
  end, value = item
  is_integer = isinstance(end, numbers.Integral) and not isinstance(end, bool)
  if not is_integer or not 1 <= end <= length:
    raise UserError(
      f'{call} returned the pair {excerpt(item)}; its first element must be an integer from 1 to '
      f'{length}, the number of characters of the response.'
    )
  return int(end), parse_number(value, call, _VALID)
