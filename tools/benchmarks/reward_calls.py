"""Times calls of a user's reward function: a judge that waits, and rewards of parts of a text.

The rewards are checked: each judge is right, and (end, value) pairs reach the tokens of their ends.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks import data_rows

from segjax.config.settings import RewardShaping
from segjax.data.tokenizer import load_tokenizer
from segjax.report.console import table
from segjax.train.custom_reward import parse_token_rewards
from segjax.train.response_functions import ResponseFunction, Responses


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  command.add_argument('--responses', type=int, default=1024)
  command.add_argument('--concurrency', type=int, default=64, help='calls of the judge at once')
  command.add_argument('--seconds', type=float, default=1.0, help='that a judge takes')
  command.add_argument('--length', type=int, default=1024, help='tokens of a response')
  command.add_argument('--pairs', type=int, default=50, help='(end, value) of a response')


def run(responses: int, concurrency: int, seconds: float, length: int, pairs: int) -> dict:
  """Prints the table; returns the fields of the JSON line."""

  def judge(prompt: str, response: str) -> float:
    time.sleep(seconds)
    return float(response)

  async def async_judge(prompt: str, response: str) -> float:
    await asyncio.sleep(seconds)
    return float(response)

  fields = {
    'thread_judge_seconds': _time_judge(judge, responses, concurrency),
    'async_judge_seconds': _time_judge(async_judge, responses, concurrency),
    'pairs_ms_per_response': _time_pairs(min(responses, 256), length, pairs),
  }
  table(
    f'{responses:,} responses, {concurrency} calls of {seconds:g} s at once; {pairs} pairs',
    ('', 'time'),
    [(name, f'{value:.2f}') for name, value in fields.items()],
  )
  return fields


def _time_judge(judge: Callable, count: int, concurrency: int) -> float:
  """Returns the seconds of a rollout."""
  settings = RewardShaping(reward_fn_concurrency=concurrency)
  function = ResponseFunction(judge, parse_token_rewards, lambda ids: str(ids[0]), settings)
  begin = time.perf_counter()
  values = function(Responses([''] * count, list(np.arange(count)[:, None]))).values
  elapsed = time.perf_counter() - begin
  assert values == [[(0, float(number))] for number in range(count)]
  return elapsed


def _time_pairs(count: int, length: int, pairs: int) -> float:
  """Returns the milliseconds of a response in the second of two rollouts."""
  with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / 'pairs.jsonl'
    data_rows.write_pairs(path, 1000)
    data_rows.write_tokenizer(Path(directory), path)
    tokenizer = load_tokenizer(directory)
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
  (tokens,) = tokenizer.encode(['\n\n'.join(row['chosen'][-1]['content'] for row in rows)])
  starts = np.linspace(0, len(tokens) - length, 2 * count).astype(int)
  ids = [np.array(tokens[start : start + length]) for start in starts]

  def reward(prompt: str, response: str) -> list[tuple[int, float]]:
    return [(round(len(response) * (k + 1) / pairs), 1.0) for k in range(pairs)]

  function = ResponseFunction(reward, parse_token_rewards, tokenizer.decode, RewardShaping())
  function(Responses([''] * count, ids[:count]))  # meets the vocabulary
  begin = time.process_time()  # nothing waits
  values = function(Responses([''] * count, ids[count:])).values
  elapsed = time.process_time() - begin
  for row, value in zip(ids[count:], values, strict=True):
    text, (token, _) = tokenizer.decode(row), value[0]
    end = round(len(text) / pairs)
    assert len(tokenizer.decode(row[:token])) < end <= len(tokenizer.decode(row[: token + 1]))
  return elapsed / count * 1e3
