"""Files and directories that appear complete or not at all, and JSON lines that survive a kill.

What they contain is decided by the caller.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from segjax.errors import UserError


def check_target(
  directory: Path, own: Collection[str], *, overwrite: bool, source: Path | None = None
) -> None:
  """Raises ValueError unless a checkpoint may be written to `directory`.

  Args:
    directory: directory to write.
    own: names of files that may be replaced, in addition to model*.safetensors.
    overwrite: replace an existing checkpoint.
    source: directory that is read meanwhile and must not be replaced.
  """
  if not directory.exists():
    return
  if not directory.is_dir():
    raise UserError(f'{directory} is a file; name a directory to write to.')
  if source is not None and source.resolve() == directory.resolve():
    raise UserError(f'{directory} is also the source; write to another directory.')
  files = sorted(file.name for file in directory.iterdir())
  for name in files:
    if name not in own and not re.fullmatch(r'model.*\.safetensors', name):
      raise UserError(
        f'{directory} holds {name}, so it is more than a checkpoint and is not replaced; '
        'write to a new directory.'
      )
  if files and not overwrite:
    raise UserError(f'{directory} is not empty; name a new directory, or use --overwrite.')


def check_space(directory: Path, num_bytes: int) -> None:
  """Raises ValueError unless the disk of `directory` has `num_bytes` free."""
  # The directory and some of its parents may not exist yet.
  existing = next(parent for parent in directory.parents if parent.is_dir())
  free = shutil.disk_usage(existing).free
  if free < num_bytes:
    raise UserError(
      f'{directory} needs {num_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk; '
      'make room, or write elsewhere.'
    )


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
  """Raises UserError, with what to do, where the block cannot write `path`."""
  try:
    yield
  except OSError as error:
    fixes = {
      (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): 'make room on its disk',
      (errno.EACCES, errno.EPERM, errno.EROFS): 'get the right to write there',
      (
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
      ): 'remove what is in its place',
    }
    fix = next((fix for codes, fix in fixes.items() if error.errno in codes), 'check its disk')
    raise UserError(
      f'{path} cannot be written ({error.strerror or error}); {fix}, or write elsewhere.'
    ) from error


def make_directory(path: Path) -> None:
  """Creates a directory and its parents, unless it exists; raises UserError if it cannot."""
  with writing(path):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, tag: str = '') -> Iterator[Path]:
  """Yields a partial file that replaces `path` if the block ends without an error.

  A reader sees the old content or the new one, never a part. After an error the partial file is
  removed; one left by a killed process is overwritten by the next write.

  Args:
    tag: part of the partial file's name; must be unique where several processes write `path`.
  """
  # In the same directory: a rename is atomic only within one file system.
  partial = path.with_name(f'{path.name}{tag}.partial')
  try:
    with writing(path):
      yield partial
      _sync_file(partial)  # without it a power failure could leave an empty file under the new name
      partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):  # the directory may be missing
      partial.unlink(missing_ok=True)
    raise


def write_text_atomically(path: Path, text: str) -> None:
  """Writes UTF-8 text to `path`, replacing what was there; see `atomic_file`."""
  with atomic_file(path) as partial:
    partial.write_text(text, encoding='utf-8')


class JsonLine(NamedTuple):
  """A line of a JSON lines file: its position and length in bytes, and its value."""

  offset: int
  size: int
  value: dict[str, Any]


def scan_json_lines(path: Path) -> Iterator[JsonLine]:
  """Yields the lines of a file that are JSON objects; none if there is no file.

  Skips torn lines: a process may have been killed while it wrote one, or may still be writing it.
  """
  if not path.exists():
    return
  offset = 0
  with path.open('rb') as file:
    for line in file:
      try:
        value = json.loads(line)
      except (ValueError, RecursionError):  # neither JSON nor UTF-8: torn, or still being written
        value = None
      if isinstance(value, dict):
        yield JsonLine(offset, len(line), value)
      # Of torn lines too: offsets are positions in the file.
      offset += len(line)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the values of a file's valid lines; see `scan_json_lines`."""
  return (line.value for line in scan_json_lines(path))


def truncate_json_lines(path: Path, step: int) -> None:
  """Drops the lines whose 'step' is `step` or later, and torn lines or those without a step.

  A run that resumes from a checkpoint repeats these steps. The file is replaced atomically, so a
  kill loses no line.
  """
  if not path.exists():
    return
  with atomic_file(path) as partial, path.open('rb') as old, partial.open('wb') as new:
    for line in scan_json_lines(path):
      if is_before(line.value, step):
        old.seek(line.offset)
        # A last line without its newline would be joined with the next one that is appended.
        new.write(old.read(line.size).rstrip(b'\n') + b'\n')


def is_before(values: dict[str, Any], step: int) -> bool:
  """Returns whether the values are those of a step before `step`."""
  number = values.get('step')
  return isinstance(number, int) and not isinstance(number, bool) and number < step


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
  """Yields a new directory that replaces `directory` when the block ends without error.

  All files are synced to disk before the replacement. After an error the new directory is removed;
  one left by a killed process is removed by the next process that writes to the same path. The
  earlier `directory` stays until the end; if the machine fails during the replacement itself, it is
  kept as `.NAME.partial-*.old`.
  """
  # The host and the pid are in the name: only a dead process of this machine may be swept, and a
  # pid says nothing about those of another machine.
  stem = f'.{directory.name}.partial-{socket.gethostname()}-'
  partial = directory.with_name(f'{stem}{os.getpid()}')
  try:
    with writing(directory):
      _sweep(directory.parent, stem)
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)
      yield partial
      _sync(partial)  # first: the new name must not appear before its data
      _rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the renaming


def _sweep(parent: Path, stem: str) -> None:
  """Removes directories that killed processes of this machine left."""
  if not parent.is_dir():
    return
  for file in parent.iterdir():
    pid = file.name.removeprefix(stem)
    if file.name.startswith(stem) and pid.isdecimal() and not _is_running(int(pid)):
      shutil.rmtree(file, ignore_errors=True)


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)  # signal 0 only asks whether the process exists
  except ProcessLookupError:
    return False
  except PermissionError:  # it runs, under another user
    pass
  return True


def _sync(directory: Path) -> None:
  """Waits until a directory and everything in it are on the disk."""
  for parent, _, files in os.walk(directory, topdown=False):
    # Files before the directory that names them.
    for name in (*(os.path.join(parent, file) for file in files), parent):
      _sync_file(name)


def _sync_file(path: Path | str) -> None:
  """Waits until a file's or a directory's own content is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _rename(partial: Path, directory: Path) -> None:
  """Replaces `directory` by `partial`; restores it if that fails."""
  old = None
  if directory.exists():
    # A rename cannot replace a directory that is not empty. With two the old directory stays until
    # the new one is in its place.
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
