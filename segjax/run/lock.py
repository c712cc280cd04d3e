"""Locks the local directory of a run against a second run, by a lock of the kernel."""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.errors import UserError
from segjax.storage import writing

FILE = 'lock.json'

Holder = dict[str, Any]  # pid and host for messages, run: unique; {} if unknown


class LockedError(UserError):
  """Another run holds the directory."""

  def __init__(self, directory: Path | str, holder: Holder):
    name = f'process {holder.get("pid")} on {holder.get("host")}' if holder else 'another process'
    super().__init__(
      f'--workdir={directory} is in use by {name}; use another one, or wait for it to end.'
    )


@contextlib.contextmanager
def lock_workdir(workdir: Path, url: str = '') -> Iterator[tuple[Holder, Holder]]:
  """Holds the directory for this process; with several processes the first one holds it for all.

  The kernel releases the lock when its holder ends, however that happens: a file left by a killed
  run does not lock.

  Args:
    workdir: the directory.
    url: the directory as the user names it, if it is the local copy of a bucket.

  Yields:
    This process as a holder, and the one that was killed here before it, {} if there is none.

  Raises:
    LockedError: another run holds the directory; names its pid and host.
  """
  if not processes.is_first():
    yield {}, {}
    return
  holder = {'pid': os.getpid(), 'host': socket.gethostname(), 'run': uuid.uuid4().hex}
  with writing(workdir / FILE):
    opened = (workdir / FILE).open('a+', encoding='utf-8')
  with opened as file:
    file.seek(0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise LockedError(url or workdir, parse_holder(file.read())) from None
    killed = parse_holder(file.read())
    if killed.get('host') != holder['host']:
      killed = {}  # it may be alive: over NFS, not every kernel sees the locks of other hosts
    file.truncate(0)
    json.dump(holder, file)
    file.flush()
    try:
      yield holder, killed
    finally:
      file.truncate(0)


def parse_holder(text: str | bytes) -> Holder:
  """Returns the holder that a lock file names, {} if the file is empty or damaged."""
  with contextlib.suppress(ValueError, RecursionError):
    holder = json.loads(text)
    return holder if isinstance(holder, dict) else {}
  return {}
