"""One run per working directory."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from segjax import processes

FILE = 'lock.json'


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds the directory for this process.

  The system lets the lock go with the process that holds it, however that ends: the file that a
  killed run leaves is stale, and taken over.

  Raises:
    ValueError: another run holds it; names its pid and host. With several processes, the first
      holds it for all.
  """
  if not processes.is_first():
    yield
    return
  with (workdir / FILE).open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'{workdir} is in use by {_holder(workdir)}; {_ADVICE}') from None
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
