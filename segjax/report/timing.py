"""Measures steps and their parts in seconds, apart from the time in which XLA compiles.

A dispatched program returns before it is computed, so the time at which its call returns says
nothing about the devices. `Completion` observes when its results are ready.
"""

import contextlib
import functools
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


class Part:
  """The time from the end of the part before to when the arrays of this one are ready.

  The host need not wait: numbers are asked for later. While the devices are busy with the part
  before, neither the host's work nor its compiling takes time of this part.

  Args:
    before: the part before; None begins the time.
    arrays: what the part computes; None ends it now.
  """

  def __init__(self, before: 'Part | None' = None, arrays: Any = None):
    self._before = before
    self._dispatched = time.monotonic()
    self._completion = None if arrays is None else Completion(arrays)

  @functools.cached_property
  def _times(self) -> tuple[float, float, float]:
    """(end, seconds without compiling, seconds of compiling); waits for the arrays."""
    end = self._dispatched if self._completion is None else self._completion.wait()
    # Parts must not be kept alive by those that follow.
    before, self._before = self._before, None
    if before is None:
      return end, 0.0, 0.0
    end = max(end, before.end)
    begin = max(before._dispatched, before.end)
    compiling = compile_seconds(begin, min(self._dispatched, end))
    return end, end - before.end - compiling, compiling

  @property
  def end(self) -> float:
    """When it ended, in monotonic seconds."""
    return self._times[0]

  @property
  def seconds(self) -> float:
    """Its seconds, without those in which the host compiled and the devices waited."""
    return self._times[1]

  @property
  def compiling(self) -> float:
    """The seconds in which the host compiled and the devices waited."""
    return self._times[2]


class Later:
  """A number that `float` computes, once arrays are ready."""

  def __init__(self, value: Callable[[], float]):
    self._value = value

  def __float__(self) -> float:
    return self._value()


def time_evaluation(evaluate: Callable[[], dict[str, Any]], step: Any) -> dict[str, Any]:
  """Returns the metrics of an evaluation with its seconds, which begin when `step` is computed."""
  before = Part(arrays=step)
  metrics = evaluate()
  part = Part(before, metrics)
  return metrics | {'timing/evaluate': Later(lambda: part.seconds)}


class StepTimer:
  """Measures the seconds of each part of a step, whose numbers are known later.

  The parts of a step add up to its time; 'timing/between_steps' is what is spent outside of the
  others.
  """

  def __init__(self):
    self._parts: dict[str, list[Part]] = {}
    self._last: Part | None = None

  def begin(self) -> None:
    """Begins a step."""
    self._parts = {}
    if self._last is None:  # what came before the first step is no part of any
      self._last = Part()
    self.end('between_steps')

  def end(self, part: str, arrays: Any = None) -> None:
    """Ends the part that began when the last one ended, once its arrays are ready."""
    self._last = Part(self._last, arrays)
    self._parts.setdefault(part, []).append(self._last)

  @property
  def seconds(self) -> dict[str, Later]:
    """By 'timing/PART', of all parts together as 'timing/step', and of compiling."""
    every = [part for parts in self._parts.values() for part in parts]
    return {
      **{f'timing/{name}': _sum_later(parts, 'seconds') for name, parts in self._parts.items()},
      'timing/step': _sum_later(every, 'seconds'),
      'timing/compile': _sum_later(every, 'compiling'),
    }


def _sum_later(parts: list[Part], name: str) -> Later:
  return Later(lambda: sum(getattr(part, name) for part in parts))
