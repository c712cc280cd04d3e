"""Calls for responses: parameters by name, batches, coroutines, threads, failures, limits."""

import asyncio
import threading
import time

import pytest

from segjax import processes
from segjax.config.settings import RewardShaping
from segjax.errors import UserError
from segjax.train import response_functions
from segjax.train.response_functions import ResponseFunction, Responses
from segjax.train.user_functions import parse_number

RESPONSES = Responses(
  prompts=['a', 'b', 'c', 'd'],
  ids=[[65, 66], [], [67], [68, 69, 70]],
  row=lambda index: {'answer': index},
  messages=lambda index: [{'role': 'user', 'content': 'abcd'[index]}],
  step=7,
)


def parse(returned, response):
  return parse_number(returned, response.call, 'a number.')


def decode(ids):
  return ''.join(map(chr, ids))


def call(function, responses=RESPONSES, is_batch=False, **settings):
  shaping = RewardShaping(**{f'reward_fn_{name}': value for name, value in settings.items()})
  return ResponseFunction(function, parse, decode, shaping, is_batch)(responses)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
  monkeypatch.setattr(response_functions, '_FIRST_WAIT', 0.001)


def test_a_function_gets_what_it_asks_for_by_name():
  seen = []

  def function(prompt, response, *, tokens, row, messages, step):
    seen.append((prompt, response, tokens, row, messages[0]['content'], step))
    return len(seen)

  # The response without tokens has no value.
  assert call(function).values == [1, None, 2, 3]
  assert seen == [
    ('a', 'AB', ['A', 'B'], {'answer': 0}, 'a', 7),
    ('c', 'C', ['C'], {'answer': 2}, 'c', 7),
    ('d', 'DEF', ['D', 'E', 'F'], {'answer': 3}, 'd', 7),
  ]


def test_a_batch_function_gets_all_at_once():
  seen = []

  def function(prompts, responses, row, step):
    seen.append((prompts, responses, row, step))
    return [1, 2, 3]

  def wrong(prompts, responses):
    return [1, None, 3]

  assert call(function, is_batch=True).values == [1, None, 2, 3]
  assert seen == [(['a', 'c', 'd'], ['AB', 'C', 'DEF'], [{'answer': i} for i in (0, 2, 3)], 7)]
  results = call(wrong, is_batch=True, on_error='zero')
  assert results.values == [1, None, None, 3]
  assert [text.endswith("on the prompt 'c' returned None; return a number.") for text in
          results.failures] == [True]  # fmt: skip
  with pytest.raises(
    UserError, match=r"3 responses, the first to the prompt 'a' returned \[1\]; re"
  ):
    call(lambda prompts, responses: [1], is_batch=True)
  assert call(function, Responses(['a'], [[]]), is_batch=True).values == [None]


class Counted:
  """Counts the calls that run at once; in threads, each waits for two others."""

  def __init__(self):
    self.now = self.most = 0
    self.lock, self.barrier = threading.Lock(), threading.Barrier(3)

  def change(self, by):
    with self.lock:
      self.now += by
      self.most = max(self.most, self.now)

  def plain(self, prompt, response):
    self.change(1)
    self.barrier.wait(timeout=10)
    self.change(-1)
    return ord(prompt)

  async def coroutine(self, prompt, response):
    self.change(1)
    await asyncio.sleep(0.01)
    self.change(-1)
    return ord(prompt)


@pytest.mark.parametrize(
  'kind, concurrency, most', [('plain', 3, 3), ('coroutine', 3, 3), ('coroutine', 0, 9)]
)
def test_so_many_calls_run_at_once_and_results_keep_their_order(kind, concurrency, most):
  counted, letters = Counted(), 'abcdefghi'
  responses = Responses(list(letters), [[65]] * 9)
  values = call(getattr(counted, kind), responses, concurrency=concurrency).values
  assert values == list(map(ord, letters))
  assert counted.now == 0 and counted.most == most


def test_by_default_a_plain_function_runs_in_the_calling_thread():
  threads = set()

  def function(prompt, response):
    threads.add(threading.current_thread())
    return 0

  call(function)
  assert threads == {threading.current_thread()}
  call(function, concurrency=2)
  assert len(threads) > 1


def test_coroutines_of_all_rollouts_run_on_one_loop_also_beside_another():
  loops = set()

  async def function(prompt, response):
    loops.add(asyncio.get_running_loop())
    return 0

  async def notebook():
    return call(function)

  call(function)
  assert asyncio.run(notebook()).values == [0, None, 0, 0]
  assert len(loops) == 1


class Flaky:
  """Fails so many times for the prompt 'c', by its error."""

  def __init__(self, times, error):
    self.left, self.error = times, error

  def plain(self, prompt, response):
    if prompt == 'c' and self.left:
      self.left -= 1
      raise self.error
    return 1

  async def coroutine(self, prompt, response):
    return self.plain(prompt, response)


@pytest.mark.parametrize('kind', ['plain', 'coroutine'])
@pytest.mark.parametrize('concurrency', [0, 2])
@pytest.mark.parametrize('error', [TimeoutError('503'), StopIteration(), SystemExit(2)])
def test_retries_and_failures(kind, concurrency, error):
  def flaky(times):
    return getattr(Flaky(times, error), kind)

  assert call(flaky(2), retries=2, concurrency=concurrency) == ([1, None, 1, 1], [])
  values, failures = call(flaky(3), retries=2, concurrency=concurrency, on_error='zero')
  assert values == [1, None, None, 1]
  (text,) = failures
  assert "on the prompt 'c' raised " in text and '\n' not in text
  with pytest.raises(UserError, match=rf"{kind} on the prompt 'c' raised "):
    call(flaky(3), retries=2, concurrency=concurrency)


def test_a_value_of_no_use_is_asked_for_again():
  values = iter([1, None, 2, 3])
  assert call(lambda prompt, response: next(values), retries=1).values == [1, None, 2, 3]


def slow_for_c(prompt, response):
  time.sleep(5 if prompt == 'c' else 0)
  return ord(prompt)


async def async_slow_for_c(prompt, response):
  await asyncio.sleep(5 if prompt == 'c' else 0)
  return ord(prompt)


@pytest.mark.parametrize('function', [slow_for_c, async_slow_for_c])
def test_a_call_past_its_time_limit_fails(function):
  begin = time.perf_counter()
  values, (text,) = call(function, timeout=0.3, on_error='zero')
  assert values == [97, None, None, 100] and time.perf_counter() - begin < 5
  assert text == (
    f"{__name__}:{function.__name__} on the prompt 'c' took longer than config.reward_shaping."
    'reward_fn_timeout=0.3 s; raise it, or set reward_fn_retries or reward_fn_on_error=zero.'
  )
  with pytest.raises(UserError, match='took longer'):
    call(function, Responses(['c'], [[67]]), timeout=0.01)


def test_the_first_failure_ends_the_other_calls():
  ended = []

  async def function(prompt, response):
    try:
      await asyncio.sleep(5 if prompt != 'c' else 0)
    except asyncio.CancelledError:
      ended.append(prompt)
      raise
    raise ValueError('no')

  with pytest.raises(UserError, match="'c' raised ValueError: no in line"):
    call(function)
  assert sorted(ended) == ['a', 'd']


@pytest.mark.parametrize('index', [0, 1])
def test_of_several_processes_the_first_calls_and_all_get_its_results(monkeypatch, index):
  """What the first process sends is passed on by hand."""
  sent = {}

  def broadcast(value):
    if index == 0:
      sent['value'] = value
    return sent['value']

  calls = []

  def function(prompt, response):
    calls.append(prompt)
    if prompt == 'd':
      raise ValueError('no')
    return 1

  monkeypatch.setattr(processes, '_process_count', 2)
  monkeypatch.setattr(processes, '_process_index', index)
  monkeypatch.setattr(processes, 'broadcast_from_first', broadcast)
  sent['value'] = ([[1.0, None, 1.0, None], ['a line']], None)
  values, failures = call(function, on_error='zero')
  assert values == [1, None, 1, None] and len(failures) == 1
  assert calls == ([] if index else ['a', 'c', 'd'])
  sent['value'] = (None, 'a line')
  with pytest.raises(UserError, match='a line' if index else 'raised ValueError: no'):
    call(function)
