"""One run per working directory, on a file system or a bucket."""

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

_BEAT = 10.0  # seconds between two signs of life on a bucket
_PATIENCE = 35.0  # seconds without one, after which the holder is gone
_SETTLE = 1.0  # seconds in which another that began at the same time is seen


class LockedError(UserError):
  """Another run holds the directory."""


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
  """Holds the directory for this process.

  The system lets the lock go with the process that holds it, however that ends: the file that a
  killed run leaves is stale, and taken over.

  Raises:
    LockedError: another run holds it; names its pid and host. With several processes, the first
      holds it for all.
  """
  if not processes.is_first():
    yield
    return
  with (workdir / FILE).open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise LockedError(f'{workdir} is in use by {_holder(workdir)}; {_ADVICE}') from None
    file.truncate(0)
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    try:
      yield
    finally:
      file.truncate(0)


_ADVICE = 'give another --workdir, or wait for it to end.'


def _holder(workdir: Path) -> str:
  try:
    holder = json.loads((workdir / FILE).read_text(encoding='utf-8'))
    return f'process {holder["pid"]} on {holder["host"]}'
  except (ValueError, KeyError):
    return 'another process, which has just begun'


@contextlib.contextmanager
def lock_bucket(files: Any, path: str, url: str) -> Iterator[None]:
  """Holds a directory of a bucket for this process by a file that it writes anew every ten seconds.

  A file that stands still for 35 s, or whose process is gone from this machine, is stale and taken
  over; no clocks are compared. Buckets have no locks that go with their process, so this guards
  against mistakes, not against all: a holder that cannot reach the bucket for so long may lose it,
  and ends itself when it sees that it did.

  Args:
    files: the file system, of fsspec.
    path: of the lock there.
    url: the directory, as the user names it.

  Raises:
    LockedError: another run holds it; names its pid and host. With several processes, the first
      holds it for all.
  """
  if not processes.is_first():
    yield
    return
  _wait_until_free(files, path, url)
  sign = {'pid': os.getpid(), 'host': socket.gethostname(), 'machine': _machine()}
  sign['run'] = uuid.uuid4().hex
  _write(files, path, sign, 0)
  time.sleep(_SETTLE)
  _check_own(files, path, url, sign)
  ended = threading.Event()
  beating = threading.Thread(target=_beat, args=(files, path, url, sign, ended), daemon=True)
  beating.start()
  try:
    yield
  finally:
    ended.set()
    beating.join()
    with contextlib.suppress(Exception):  # left behind, it is stale
      _check_own(files, path, url, sign)
      files.rm_file(path)


def _wait_until_free(files: Any, path: str, url: str) -> None:
  seen, end = _read(files, path), time.monotonic() + _PATIENCE
  while seen and not _is_dead(seen) and time.monotonic() < end:
    time.sleep(_BEAT / 10)
    now = _read(files, path)
    if now and now != seen:
      raise LockedError(f'{url} is in use by {_named(now)}; {_ADVICE}')
    seen = now


def _beat(files: Any, path: str, url: str, sign: dict[str, Any], ended: threading.Event) -> None:
  beat = 0
  while not ended.wait(_BEAT):
    beat += 1
    try:
      _check_own(files, path, url, sign)
      _write(files, path, sign, beat)
    except LockedError as error:
      print(f'segjax: {error} This one stops.', file=sys.stderr, flush=True)
      os._exit(1)
    except Exception:  # the bucket is out of reach for now
      continue


def _check_own(files: Any, path: str, url: str, sign: dict[str, Any]) -> None:
  """LockedError where the lock is another's by now."""
  now = _read(files, path)
  if now and now.get('run') != sign['run']:
    raise LockedError(f'{url} is in use by {_named(now)}; {_ADVICE}')


def _read(files: Any, path: str) -> dict[str, Any]:
  """What stands in the lock; {} where there is none."""
  try:
    return json.loads(files.cat_file(path))
  except (FileNotFoundError, ValueError):
    return {}


def _write(files: Any, path: str, sign: dict[str, Any], beat: int) -> None:
  files.pipe_file(path, json.dumps(sign | {'beat': beat}).encode())


def _machine() -> str:
  """Differs from start to start of a machine, '' where it is not known."""
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
  except OSError:
    return ''


def _is_dead(sign: dict[str, Any]) -> bool:
  """Whether the holder was a process of this machine that is no more."""
  if not _machine() or (sign.get('machine'), sign.get('host')) != (
    _machine(),
    socket.gethostname(),
  ):
    return False
  return not Path(f'/proc/{sign["pid"]}').exists()


def _named(sign: dict[str, Any]) -> str:
  return f'process {sign.get("pid")} on {sign.get("host")}'
