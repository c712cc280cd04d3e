"""Measures steps and their parts in seconds, apart from the time in which XLA compiles.

A dispatched program returns before it is computed, so the time at which its call returns says
nothing about the devices. `Completion` observes when its results are ready.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

_COMPILE = '/jax/core/compile/'  # tracing, lowering, and compiling or reading from the cache
_BACKEND = f'{_COMPILE}backend_compile_duration'

_compiled = 0
_intervals: list[tuple[float, float]] = []  # in which the host compiled; apart, in order


def compiles() -> int:
  """Returns the number of programs compiled or read from the compilation cache since the import."""
  return _compiled


def compile_seconds(begin: float, end: float) -> float:
  """Returns the seconds of the time from `begin` to `end` in which programs were compiled."""
  overlaps = (min(last, end) - max(first, begin) for first, last in _intervals)
  return sum((overlap for overlap in overlaps if overlap > 0), 0.0)


def _record_compile(event: str, seconds: float, **_: Any) -> None:
  global _compiled
  if not event.startswith(_COMPILE):
    return
  _compiled += event == _BACKEND
  end = time.monotonic()
  begin = end - seconds
  # A function that is traced within another one reports first; its interval is part of the other's.
  while _intervals and _intervals[-1][1] >= begin:
    begin = min(begin, _intervals.pop()[0])
  _intervals.append((begin, end))


jax.monitoring.register_event_duration_secs_listener(_record_compile)


class Completion:
  """The time at which arrays are ready, observed in a thread, so that the host need not wait."""

  def __init__(self, arrays: Any):
    self._time = 0.0
    # A daemon: a computation that never ends must not keep a failed run from exiting.
    self._thread = threading.Thread(target=self._observe, args=(arrays,), daemon=True)
    self._thread.start()

  def _observe(self, arrays: Any) -> None:
    with contextlib.suppress(Exception):  # raised again where the arrays are read
      jax.block_until_ready(arrays)
    self._time = time.monotonic()

  def wait(self) -> float:
    """Waits until the arrays are ready and returns when they were, in monotonic seconds."""
    self._thread.join()
    return self._time


def time_evaluation(evaluate: Callable[[], dict[str, Any]], step: Any) -> dict[str, Any]:
  """Returns the metrics of an evaluation with its seconds, which begin when `step` is computed."""
  timer = StepTimer()
  jax.block_until_ready(step)
  timer.begin()
  metrics = evaluate()
  timer.end('evaluate', metrics)
  return metrics | {'timing/evaluate': timer.seconds['timing/evaluate']}


class StepTimer:
  """Measures the seconds of each part of a step; a part ends when its arrays are ready.

  The parts of a step add up to its time, without that in which programs were compiled.

  Attributes:
    seconds: by 'timing/PART'; 'timing/between_steps' is what is spent outside of the other parts.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last: float | None = None

  def begin(self) -> None:
    """Begins a step."""
    self.seconds = {}
    if self._last is None:  # what came before the first step is no part of any
      self._last = time.monotonic()
    self.end('between_steps')

  def end(self, part: str, arrays: Any = None) -> None:
    """Waits for the arrays and ends the part that began when the last one ended."""
    jax.block_until_ready(arrays)
    now = time.monotonic()
    seconds = now - self._last - compile_seconds(self._last, now)
    name = f'timing/{part}'
    self.seconds[name], self._last = self.seconds.get(name, 0.0) + seconds, now
