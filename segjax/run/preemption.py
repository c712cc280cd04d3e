"""Stops a run on SIGTERM, which preempted machines receive, and on SIGINT.

After the first signal the training loop saves a checkpoint and stops; the second one ends the
process immediately.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, resumes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: list[int] = []
_guests: list[bool] = []  # not empty in a process that the run does not own, as a notebook's


class PreemptedError(Exception):
  """The run has received a signal and has saved a checkpoint from which it can resume."""


@contextlib.contextmanager
def handle_signals(log_fn: Callable[[str], None]) -> Iterator[None]:
  """Records signals for `stop_requested` while the context is active.

  Args:
    log_fn: called with one line when the first signal comes.
  """

  if threading.current_thread() is not threading.main_thread():
    yield  # Python lets the main thread alone set handlers
    return

  def record(number: int, _: Any) -> None:
    if _received and _guests:
      raise KeyboardInterrupt
    if _received:
      os._exit(128 + number)
    _received.append(number)
    log_fn(
      f'{signal.Signals(number).name}: saving a checkpoint and exiting; send the signal again to '
      'exit immediately'
    )

  previous = {number: signal.signal(number, record) for number in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
    _received.clear()


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
  """Makes a second signal raise KeyboardInterrupt instead of ending the process."""
  _guests.append(True)
  try:
    yield
  finally:
    _guests.pop()


def stop_requested() -> bool:
  """Returns whether this process has received a signal; others need not have."""
  return bool(_received)


def interrupt_on_sigterm() -> None:
  """Makes SIGTERM outside of `handle_signals` end the process in one line, as Ctrl-C does."""
  signal.signal(signal.SIGTERM, signal.default_int_handler)
