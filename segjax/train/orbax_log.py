"""Keeps the log of Orbax off the console.

Orbax logs each failure of a save several times with stack traces; `checkpoint` says it in a line.
"""

import functools
import logging
import os
import sys
from types import TracebackType

from absl import logging as absl_logging


@functools.cache
def mute() -> None:
  """Drops what Orbax logs from now on, unless SEGJAX_TRACEBACK is set."""
  if os.environ.get('SEGJAX_TRACEBACK'):
    return
  absl_logging.get_absl_logger().addFilter(_is_not_orbax)
  sys.excepthook = functools.partial(_print_unless_late, sys.excepthook)


def _is_not_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname


def _print_unless_late(
  print_error, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  """Prints an error, except those of writes that end after their save has failed."""
  if not (kind is RuntimeError and str(error) == 'Event loop is closed'):
    print_error(kind, error, trace)
