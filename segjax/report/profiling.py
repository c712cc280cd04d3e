"""Traces selected steps for TensorBoard's profiler and for Perfetto (https://ui.perfetto.dev)."""

from pathlib import Path
from typing import Any

import jax

from segjax.errors import UserError

DIRECTORY = 'profile'  # within a stage's directory


def parse(steps: str) -> tuple[int, int]:
  """Returns (first, last + 1) of 'first:last', steps counted from 1 as on the console.

  (0, 0) for ''.

  Raises:
    UserError: it is not of that form, or selects no step.
  """
  if not steps:
    return 0, 0
  first, _, last = steps.partition(':')
  if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
    raise UserError(
      f'config.profile_steps={steps!r} is not first:last, steps from 1 on; write, for example, 5:7.'
    )
  return int(first), int(last) + 1


class Profiler:
  """Traces the steps of `parse`; must be closed, also after an error."""

  def __init__(self, directory: Path, steps: str):
    self._directory = directory / DIRECTORY
    self._first, self._after = parse(steps)
    self._running = False

  def before(self, step: int) -> None:
    """Starts the trace if step number `step`, from 1, is the first to trace."""
    if self._first <= step < self._after and not self._running:
      jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, arrays: Any) -> None:
    """Ends the trace after its last step, whose arrays it waits for."""
    if self._running and step + 1 >= self._after:
      jax.block_until_ready(arrays)
      self.close()

  def close(self) -> None:
    """Ends the trace if one is running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
