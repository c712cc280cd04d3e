"""Locks the directory of a run on a bucket by a file that its holder rewrites every ten seconds.

Buckets have no lock that ends with its process, so this guards against mistakes only: a holder that
cannot reach the bucket for 35 s may lose the lock, and exits when it notices.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from segjax.run.lock import FILE, Holder, LockedError, parse_holder

_HEARTBEAT = 10.0  # seconds between two writes of the lock
# Three writes may fail before the lock is lost.
_STALE_AFTER = 35.0  # seconds without a write, after which its holder is considered dead
_RACE_WINDOW = 1.0  # seconds in which a run that started at the same time becomes visible


@contextlib.contextmanager
def lock_bucket(files: Any, url: str, holder: Holder, killed: Holder) -> Iterator[None]:
  """Holds a directory of a bucket; takes over a lock that has not changed for 35 s.

  Args:
    files: the directory, as a file system of fsspec.
    url: the directory, as the user names it.
    holder: this process; see `lock.lock_workdir`.
    killed: a holder that is known to be dead, {} if none; its lock is taken over at once.

  Raises:
    LockedError: another run holds the directory; names its pid and host.
  """
  _wait_until_free(files, url, killed)
  _write(files, holder)
  time.sleep(_RACE_WINDOW)  # of two runs that wrote at once, the first reads the second's lock
  _check_own(files, url, holder)
  has_ended = threading.Event()
  heartbeat = threading.Thread(target=_keep, args=(files, url, holder, has_ended), daemon=True)
  heartbeat.start()
  try:
    yield
  finally:
    # Joined before the removal: the thread would write the lock again.
    has_ended.set()
    heartbeat.join()
    with contextlib.suppress(Exception):  # a lock that stays is taken over as stale
      _check_own(files, url, holder)
      files.rm_file(FILE)


def _wait_until_free(files: Any, url: str, killed: Holder) -> None:
  # Clocks of two machines are not compared: a holder is alive if its lock changes in the meantime.
  previous, end = _read(files), time.monotonic() + _STALE_AFTER
  while previous and previous.get('run') != killed.get('run', '') and time.monotonic() < end:
    time.sleep(_HEARTBEAT / 10)
    current = _read(files)
    if current and current != previous:
      raise LockedError(url, current)  # its holder has written in the meantime
    previous = current


def _keep(files: Any, url: str, holder: Holder, has_ended: threading.Event) -> None:
  """Rewrites the lock until `has_ended`; ends this process if another run has taken it over."""
  while not has_ended.wait(_HEARTBEAT):
    try:
      _check_own(files, url, holder)
      # Checked first: a write alone would take the lock back from the run that now holds it.
      _write(files, holder)
    except LockedError as error:
      print(f'segjax: lost the lock: {error}', file=sys.stderr, flush=True)
      os._exit(1)  # sys.exit would end this thread alone
    except Exception:  # the bucket cannot be reached at the moment
      continue


def _check_own(files: Any, url: str, holder: Holder) -> None:
  current = _read(files)
  if current and current.get('run') != holder['run']:
    raise LockedError(url, current)


def _read(files: Any) -> Holder:
  with contextlib.suppress(FileNotFoundError):
    return parse_holder(files.cat_file(FILE))
  return {}


def _write(files: Any, holder: Holder) -> None:
  files.pipe_file(FILE, json.dumps(holder | {'written': time.time()}).encode())
