"""Locks the working directory of a run, on a file system or a bucket, against a second run."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.errors import UserError

FILE = 'lock.json'

_HEARTBEAT = 10.0  # seconds between two writes of a lock on a bucket
_STALE_AFTER = 35.0  # seconds without a write, after which its holder is considered dead
_RACE_WINDOW = 1.0  # seconds in which a run that started at the same time becomes visible


class LockedError(UserError):
  """Another run holds the directory."""

  def __init__(self, directory: Path | str, holder: dict[str, Any]):
    name = f'process {holder.get("pid")} on {holder.get("host")}' if holder else 'another process'
    super().__init__(
      f'--workdir={directory} is in use by {name}; give another one, or wait for it to end.'
    )


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
  """Holds the directory for this process; of several processes the first one holds it for all.

  The kernel releases the lock when its holder ends, however that ends: the file that a killed run
  leaves does not lock.

  Raises:
    LockedError: another run holds the directory; names its pid and host.
  """
  if not processes.is_first():
    yield
    return
  with (workdir / FILE).open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise LockedError(workdir, _parse(file.read())) from None
    file.truncate(0)
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    try:
      yield
    finally:
      file.truncate(0)


@contextlib.contextmanager
def lock_bucket(files: Any, url: str) -> Iterator[None]:
  """Holds a directory of a bucket for this process by a file that it rewrites every ten seconds.

  A lock that has not changed for 35 s is taken over; no clocks are compared. Buckets have no lock
  that ends with its process, so this guards against mistakes only: a holder that cannot reach the
  bucket for that long may lose the lock, and exits when it notices. Of several processes the first
  one holds the lock for all.

  Args:
    files: the directory, as a file system of fsspec.
    url: the directory, as the user names it.

  Raises:
    LockedError: another run holds the directory; names its pid and host.
  """
  if not processes.is_first():
    yield
    return
  lock, ended = _BucketLock(files, url), threading.Event()
  lock.acquire()
  heartbeat = threading.Thread(target=lock.keep, args=(ended,), daemon=True)
  heartbeat.start()
  try:
    yield
  finally:
    ended.set()
    heartbeat.join()
    with contextlib.suppress(Exception):  # a lock that stays is taken over as stale
      lock.check_not_taken()
      files.rm_file(FILE)


class _BucketLock:
  """The lock file of this process on a bucket."""

  def __init__(self, files: Any, url: str):
    self._files, self._url = files, url
    self._holder = {'pid': os.getpid(), 'host': socket.gethostname(), 'run': uuid.uuid4().hex}

  def _read(self) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
      return _parse(self._files.cat_file(FILE))
    return {}

  def _write(self) -> None:
    self._holder['heartbeat'] = uuid.uuid4().hex
    self._files.pipe_file(FILE, json.dumps(self._holder).encode())

  def acquire(self) -> None:
    """Waits until there is no lock, or one that does not change, and writes its own."""
    previous, end = self._read(), time.monotonic() + _STALE_AFTER
    while previous and time.monotonic() < end:
      time.sleep(_HEARTBEAT / 10)
      holder = self._read()
      if holder and holder != previous:
        raise LockedError(self._url, holder)
      previous = holder
    self._write()
    time.sleep(_RACE_WINDOW)  # of two runs that wrote at once, the first reads the second's lock
    self.check_not_taken()

  def check_not_taken(self) -> None:
    """Raises LockedError if another run has taken the lock over."""
    holder = self._read()
    if holder and holder.get('run') != self._holder['run']:
      raise LockedError(self._url, holder)

  def keep(self, ended: threading.Event) -> None:
    """Rewrites the lock until `ended`; ends this process if another run has taken it over."""
    while not ended.wait(_HEARTBEAT):
      try:
        self.check_not_taken()
        self._write()
      except LockedError as error:
        print(f'segjax: lost the lock: {error}', file=sys.stderr, flush=True)
        os._exit(1)
      except Exception:  # the bucket cannot be reached at the moment
        continue


def _parse(text: str | bytes) -> dict[str, Any]:
  """Returns the holder that a lock file names, {} where the file is empty or damaged."""
  with contextlib.suppress(ValueError):
    return json.loads(text)
  return {}
