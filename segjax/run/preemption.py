"""Stopping when asked: SIGTERM, as preempted machines get it, and SIGINT.

The first signal lets the loop save and stop; the second ends the process at once.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from segjax import processes

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: list[int] = []


class PreemptedError(Exception):
  """The run was asked to stop, has saved, and can go on."""


class StepAbortedError(Exception):
  """A step was asked to stop before it changed anything."""


@contextlib.contextmanager
def handle_signals(say: Callable[[str], None]) -> Iterator[None]:
  """Within it signals are kept for `requested`; outside of it they end the process."""

  def note(number: int, _: Any) -> None:
    if _received:
      os._exit(128 + number)
    _received.append(number)
    say(f'{signal.Signals(number).name}: saving, then stopping; once more stops at once')

  before = {number: signal.signal(number, note) for number in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    _received.clear()


def stop_requested() -> bool:
  """Whether a signal has come, to this process or another."""
  return processes.any_process(bool(_received))


def raise_if_stop_requested() -> None:
  """AbandonedStepError if a signal has come; for the parts of a step that change no state."""
  if stop_requested():
    raise StepAbortedError


def interrupt_on_sigterm() -> None:
  """Makes SIGTERM, where nothing watches, end the process as Ctrl-C does: in one line."""
  signal.signal(signal.SIGTERM, signal.default_int_handler)
