"""Traces of some steps, for TensorBoard's profiler and for Perfetto (https://ui.perfetto.dev)."""

from pathlib import Path
from typing import Any

import jax

from segjax.errors import UserError

DIRECTORY = 'profile'  # in a stage's directory


def parse(steps: str) -> tuple[int, int]:
  """(first, after the last) of 'a:b', steps counted from 1 as the console does; (0, 0) for ''.

  Raises:
    ValueError: it is not of that form, or names no step.
  """
  if not steps:
    return 0, 0
  first, _, last = steps.partition(':')
  if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
    raise UserError(
      f'config.profile_steps={steps!r}: write first:last, steps from 1 on, such as 5:7.'
    )
  return int(first), int(last) + 1


class Profiler:
  """Traces the steps that `parse` understood; `close` it whatever happens."""

  def __init__(self, directory: Path, steps: str):
    self._directory = directory / DIRECTORY
    self._first, self._after = parse(steps)
    self._running = False

  def before(self, step: int) -> None:
    """Step number `step`, from 1, is about to begin."""
    if self._first <= step < self._after and not self._running:
      jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, arrays: Any) -> None:
    """The step has been dispatched; the last one traced is waited for."""
    if self._running and step + 1 >= self._after:
      jax.block_until_ready(arrays)
      self.close()

  def close(self) -> None:
    """Ends a trace that has begun."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
