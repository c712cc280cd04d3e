"""Calls a function of the user's for each response, or once for all of them.

A coroutine function runs on an event loop, another one in turn or in threads. `user_functions`
loads it; `custom_reward` says what it may return.
"""

import asyncio
import dataclasses
import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from segjax import processes
from segjax.config.settings import RewardShaping
from segjax.data.sources import Message
from segjax.data.token_texts import token_texts
from segjax.errors import UserError, excerpt
from segjax.train.user_functions import asked_by_name, describe_call, naming_errors

_COROUTINES = 64  # at once, by default
_FIRST_WAIT = 1.0  # seconds before a function is called again, doubled each time


def _nothing(index: int) -> Any:
  return {}


@dataclasses.dataclass(frozen=True)
class Responses:
  """Responses, and what a function may ask for about each of them.

  Attributes:
    prompts: the last message of each response's prompt.
    ids: tokens of each response, without padding.
    row: (index of a response) -> the columns of its row of data.
    messages: (index of a response) -> the messages of its prompt.
    step: number of the training step, from 0; None where nothing is trained.
  """

  prompts: Sequence[str]
  ids: Sequence[Sequence[int] | np.ndarray]
  row: Callable[[int], dict[str, Any]] = _nothing
  messages: Callable[[int], list[Message]] = _nothing
  step: int | None = None


class Results(NamedTuple):
  """What a function has returned for responses.

  Attributes:
    values: by `ResponseFunction.parse`; None for a response without tokens, or that failed.
    failures: the error of each response that failed, with reward_fn_on_error=zero.
  """

  values: list[Any]
  failures: list[str]


@dataclasses.dataclass(frozen=True)
class Response:
  """One response.

  Attributes:
    index: its place among the responses.
    prompt: the last message of its prompt.
    ids: its tokens.
    text: their text, without special tokens.
    call: names the function and the prompt, for an error.
    split: returns the text that each token adds.
  """

  index: int
  prompt: str
  ids: list[int]
  text: str
  call: str
  split: Callable[[list[int]], list[str]]

  @functools.cached_property
  def tokens(self) -> list[str]:
    """The text that each token adds; they join to `text`."""
    return self.split(self.ids)


class _Call(NamedTuple):
  """A call for one response, or for all of them at once."""

  name: str
  arguments: tuple[Any, ...]
  options: dict[str, Any]
  responses: list[Response]


@dataclasses.dataclass(frozen=True)
class ResponseFunction:
  """A function of (prompt, response), or of the lists of all of them, and how it is called.

  It also gets those of `user_functions.BY_NAME` that it has a parameter for: `row`, the columns of
  the row of data; `messages`, the whole prompt; `tokens`, the text that each token adds; `step`,
  the step of training. Where it is called once for all responses, each but `step` is a list.

  Attributes:
    function: the function.
    parse: (what it returned for a response, the response) -> value, which JSON can hold.
    decode: maps token ids to text, without special tokens.
    settings: how many calls run at once, how long, how often, and what happens to one that fails.
    is_batch: whether it is called once for all responses, and returns a list.
  """

  function: Callable[..., Any]
  parse: Callable[[Any, Response], Any]
  decode: Callable[[Any], str]
  settings: RewardShaping
  is_batch: bool = False

  def __call__(self, responses: Responses) -> Results:
    """Calls the function for each response that has tokens.

    Of several processes the first one calls it, so that a judge is asked once for a response, and
    all of them get its results.

    Raises:
      UserError: the function raised an exception, took too long, or returned what `parse` refuses,
        with reward_fn_on_error=stop; the message names the function and the prompt.
    """
    return Results(*processes.in_first(lambda: self._call_for(responses)))

  @functools.cached_property
  def _is_coroutine(self) -> bool:
    is_coroutine = inspect.iscoroutinefunction
    return is_coroutine(self.function) or is_coroutine(type(self.function).__call__)

  @functools.cached_property
  def _split(self) -> Callable[[list[int]], list[str]]:
    return functools.partial(token_texts, decode=self.decode, known={})

  def _call_for(self, responses: Responses) -> tuple[list[Any], list[str]]:
    chosen = [self._response(responses, i) for i, ids in enumerate(responses.ids) if len(ids)]
    values: list[Any] = [None] * len(responses.ids)
    failures = []
    for call, outcomes in self._run(self._calls(responses, chosen)):
      for response, outcome in zip(call.responses, outcomes, strict=True):
        if isinstance(outcome, UserError):
          failures.append(str(outcome))
        else:
          values[response.index] = outcome
    return values, failures

  def _response(self, responses: Responses, index: int) -> Response:
    prompt, ids = responses.prompts[index], [int(i) for i in responses.ids[index]]
    call = describe_call(self.function, f'the prompt {excerpt(prompt)}')
    return Response(index, prompt, ids, self.decode(ids), call, self._split)

  def _calls(self, responses: Responses, chosen: list[Response]) -> list[_Call]:
    asked = asked_by_name(self.function)
    sources = {
      'row': lambda response: responses.row(response.index),
      'messages': lambda response: responses.messages(response.index),
      'tokens': lambda response: response.tokens,
    }
    step = {'step': responses.step} if 'step' in asked else {}
    sources = {name: source for name, source in sources.items() if name in asked}
    if not self.is_batch:
      return [
        _Call(r.call, (r.prompt, r.text), {n: f(r) for n, f in sources.items()} | step, [r])
        for r in chosen
      ]
    if not chosen:
      return []
    subject = f'{len(chosen)} responses, the first to the prompt {excerpt(chosen[0].prompt)}'
    lists = [r.prompt for r in chosen], [r.text for r in chosen]
    options = {name: [source(r) for r in chosen] for name, source in sources.items()}
    return [_Call(describe_call(self.function, subject), lists, options | step, chosen)]

  def _run(self, calls: list[_Call]) -> list[tuple[_Call, list[Any]]]:
    """Returns each call with the value, or the error, of each of its responses."""
    s = self.settings
    at_once = s.reward_fn_concurrency or (_COROUTINES if self._is_coroutine else 1)
    if not self._is_coroutine and at_once == 1 and not s.reward_fn_timeout:
      # In this thread: what the user's module keeps may belong to it.
      return [(call, self._call_here(call)) for call in calls]
    future = asyncio.run_coroutine_threadsafe(self._run_at_once(calls, at_once), _event_loop())
    try:
      return future.result()
    finally:
      future.cancel()  # of no effect unless waiting was interrupted

  def _call_here(self, call: _Call) -> list[Any]:
    for wait in self._waits:
      try:
        return self._parse(call, self._called(call))
      except UserError as error:
        failure = error
      time.sleep(wait)
    return self._failed(call, failure)

  async def _run_at_once(self, calls: list[_Call], at_once: int) -> list[tuple[_Call, list[Any]]]:
    slots = asyncio.Semaphore(at_once)
    try:
      async with asyncio.TaskGroup() as group:  # ends the other calls if one of them raises
        tasks = [group.create_task(self._call_in_slot(call, slots)) for call in calls]
    except ExceptionGroup as errors:
      raise errors.exceptions[0]  # noqa: B904, which keeps the cause of the error
    return [(call, task.result()) for call, task in zip(calls, tasks, strict=True)]

  async def _call_in_slot(self, call: _Call, slots: asyncio.Semaphore) -> list[Any]:
    async with slots:
      for wait in self._waits:
        try:
          return self._parse(call, await self._awaited(call))
        except UserError as error:
          failure = error
        await asyncio.sleep(wait)
    return self._failed(call, failure)

  async def _awaited(self, call: _Call) -> Any:
    limit = self.settings.reward_fn_timeout
    try:
      async with asyncio.timeout(limit or None):
        if not self._is_coroutine:
          return await asyncio.wrap_future(_start_thread(lambda: self._called(call)))
        with naming_errors(self.function, call.name):
          return await self.function(*call.arguments, **call.options)
    except TimeoutError as error:  # not of the function, which would be a UserError
      raise UserError(
        f'{call.name} took longer than config.reward_shaping.reward_fn_timeout={limit:g} s; raise '
        'it, or set reward_fn_retries or reward_fn_on_error=zero.'
      ) from error

  def _called(self, call: _Call) -> Any:
    with naming_errors(self.function, call.name):
      return self.function(*call.arguments, **call.options)

  @property
  def _waits(self) -> list[float]:
    """Seconds to wait after each attempt that fails, none after the last."""
    return [_FIRST_WAIT * 2**number for number in range(self.settings.reward_fn_retries)] + [0.0]

  def _parse(self, call: _Call, returned: Any) -> list[Any]:
    """Returns the value, or the error, of each response of a call."""
    if not self.is_batch:
      return [self.parse(returned, call.responses[0])]
    if isinstance(returned, np.ndarray):
      returned = returned.tolist()
    if not isinstance(returned, list | tuple) or len(returned) != len(call.responses):
      raise UserError(
        f'{call.name} returned {excerpt(returned)}; return a list of {len(call.responses)}, one '
        'value for each response.'
      )
    return [self._parse_one(*pair) for pair in zip(returned, call.responses, strict=True)]

  def _parse_one(self, returned: Any, response: Response) -> Any:
    try:
      return self.parse(returned, response)
    except UserError as error:
      return self._failure(error)

  def _failed(self, call: _Call, error: UserError) -> list[UserError]:
    return [self._failure(error)] * len(call.responses)

  def _failure(self, error: UserError) -> UserError:
    if self.settings.reward_fn_on_error == 'stop':
      raise error
    return error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
  """Returns the loop that all coroutines run on, in a thread of its own.

  One for the life of the process: a client that the user's module keeps belongs to the loop on
  which it was first used, and a notebook's own loop cannot be waited for.
  """
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, name='functions of responses', daemon=True).start()
  return loop


def _start_thread(function: Callable[[], Any]) -> Future:
  """Starts a function in a thread that nothing waits for: a call past its time limit goes on."""
  future: Future = Future()

  def run() -> None:
    future.set_running_or_notify_cancel()
    try:
      result = function()
    except BaseException as error:
      future.set_exception(error)
    else:
      future.set_result(result)

  threading.Thread(target=run, daemon=True).start()
  return future
