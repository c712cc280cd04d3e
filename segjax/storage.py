"""A directory that appears whole or not at all. What is in it is the caller's business."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from segjax.errors import UserError


def check_target(
  directory: Path, own: Collection[str], *, overwrite: bool, source: Path | None = None
) -> None:
  """ValueError unless a checkpoint may be written to `directory`.

  Args:
    own: names of what may be replaced; model*.safetensors are, too.
    overwrite: replace a checkpoint that is there already.
    source: what is read meanwhile, and is not replaced.
  """
  if not directory.exists():
    return
  if not directory.is_dir():
    raise UserError(f'{directory} is a file; name a directory to write to.')
  if source is not None and source.resolve() == directory.resolve():
    raise UserError(f'{directory} is also the source; write to another one.')
  files = sorted(file.name for file in directory.iterdir())
  for name in files:
    if name not in own and not re.fullmatch(r'model.*\.safetensors', name):
      raise UserError(
        f'{directory} holds {name}, so it is more than a checkpoint and is not replaced; '
        'write to a new directory.'
      )
  if files and not overwrite:
    raise UserError(f'{directory} is not empty; name a new directory, or give --overwrite.')


def check_space(directory: Path, num_bytes: int) -> None:
  """ValueError unless the disk of `directory` has `num_bytes` to spare."""
  place = next(parent for parent in directory.parents if parent.is_dir())
  free = shutil.disk_usage(place).free
  if free < num_bytes:
    raise UserError(
      f'{directory} needs {num_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk; '
      'make room, or write elsewhere.'
    )


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
  """A new directory beside `directory`, which takes its place when the block ends without error.

  By then all of it is on the disk. After an error it is removed; what a killed process left is
  removed by the next one that writes to the same place. An earlier `directory` is there until the
  end, and its remains after that are `.NAME.partial-*.old`, should the machine fail just then.
  """
  stem = f'.{directory.name}.partial-{socket.gethostname()}-'
  _sweep(directory.parent, stem)
  partial = directory.with_name(f'{stem}{os.getpid()}')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    _sync(partial)
    _rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _sweep(parent: Path, stem: str) -> None:
  """Removes what processes of this machine began and were killed over."""
  if not parent.is_dir():
    return
  for file in parent.iterdir():
    pid = file.name.removeprefix(stem)
    if file.name.startswith(stem) and pid.isdecimal() and not _is_running(int(pid)):
      shutil.rmtree(file, ignore_errors=True)


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _sync(directory: Path) -> None:
  """Waits until a directory and all in it are on the disk."""
  for place, _, files in os.walk(directory, topdown=False):
    for name in (*(os.path.join(place, file) for file in files), place):
      descriptor = os.open(name, os.O_RDONLY)
      try:
        os.fsync(descriptor)
      finally:
        os.close(descriptor)


def _rename(partial: Path, directory: Path) -> None:
  """Puts `partial` in the place of `directory`."""
  old = None
  if directory.exists():
    old = partial.with_name(partial.name + '.old')
    directory.rename(old)
  try:
    partial.rename(directory)
  except OSError:
    if old is not None:
      old.rename(directory)
    raise
  if old is not None:
    shutil.rmtree(old)
