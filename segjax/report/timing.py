"""Measures the parts of a step in seconds, and counts the programs that XLA compiled."""

import time
from typing import Any

import jax

_compiled = 0


def compiles() -> int:
  """Returns the number of programs compiled or read from the compilation cache since the import."""
  return _compiled


def _count(event: str, _: float, **__: Any) -> None:
  global _compiled
  _compiled += event == '/jax/core/compile/backend_compile_duration'


jax.monitoring.register_event_duration_secs_listener(_count)


class StepTimer:
  """Measures the seconds of each part of a step; a part ends when its arrays are ready.

  Attributes:
    seconds: by 'timing/PART'; 'timing/between_steps' is the time between two steps.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def begin(self) -> None:
    """Begins a step."""
    self.seconds = {}
    self.end('between_steps')

  def end(self, part: str, arrays: Any = None) -> None:
    """Waits for the arrays and ends the part that began when the last one ended."""
    jax.block_until_ready(arrays)
    now = time.monotonic()
    self.seconds[f'timing/{part}'], self._last = now - self._last, now
