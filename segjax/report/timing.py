"""Where the time of a step goes, and how often XLA compiled."""

import time
from typing import Any

import jax

_compiled = 0


def compiles() -> int:
  """Programs compiled, or read from the cache of compiled programs, since this was imported."""
  return _compiled


def _count(event: str, _: float, **__: Any) -> None:
  global _compiled
  _compiled += event == '/jax/core/compile/backend_compile_duration'


jax.monitoring.register_event_duration_secs_listener(_count)


class StepTimer:
  """Seconds of each part of a step; a part ends when its arrays are ready.

  Attributes:
    seconds: by 'timing/PART'; 'timing/between_steps' is what passed between two steps.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def begin(self) -> None:
    """A step begins."""
    self.seconds = {}
    self.end('between_steps')

  def end(self, part: str, arrays: Any = None) -> None:
    """The part that has gone on since the last one ended is done once the arrays are ready."""
    jax.block_until_ready(arrays)
    now = time.monotonic()
    self.seconds[f'timing/{part}'], self._last = now - self._last, now
