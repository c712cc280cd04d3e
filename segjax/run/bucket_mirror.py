"""Copies between a working directory on a bucket and the local directory that a run works in.

Buckets have no appends and no renames of directories, and models and metrics are written to local
files. Training states do not pass through here: they go to the bucket directly (`checkpoint_dir`).
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from segjax import processes
from segjax.errors import UserError, first_line
from segjax.run import lock, stage_record

STATES = 'checkpoints'  # training states: <stage>/<fingerprint of its key>

_RETRY_PAUSE = 2.0  # seconds before the first retry of a push that must succeed; then doubled


class NoMirror:
  """Does nothing: the mirror of a run whose working directory is local."""

  def checkpoint_dir(self, stage: Path) -> epath.Path | None:
    """Returns where the training states of a stage go; None: to its own directory."""
    del stage

  def try_push(self) -> bool:
    """Returns whether the bucket has all files; if it cannot be written, a later push does it."""
    return True

  def push_and_wait(self, *_: Path) -> None:
    """Returns once the bucket has all files and all processes have copied them from there."""

  @contextlib.contextmanager
  def hold_lock(self, workdir: Path) -> Iterator[None]:
    """Holds the working directory for this run."""
    with lock.lock_workdir(workdir):
      yield


class BucketMirror(NoMirror):
  """Keeps a bucket and a local directory equal; where they differ at the start, the bucket wins.

  Files are uploaded before the `stage.json` that declares them valid, and a `stage.json` whose key
  changes is removed first: a run can resume from the bucket whenever it was killed.

  Args:
    url: the working directory, as gs://bucket/run.
    local: the local directory of this process.
    max_failures: number of consecutive pushes that may fail.
    log_fn: called with each failure that the run survives.

  Raises:
    UserError: the bucket cannot be read.
  """

  def __init__(
    self, url: str, local: Path, max_failures: int, log_fn: Callable[[str], None] = print
  ):
    from fsspec.core import url_to_fs
    from fsspec.implementations.dirfs import DirFileSystem

    self._url, self._local = url.rstrip('/'), local
    self._max_failures, self._failures, self._log = max_failures, 0, log_fn
    # Of files that are equal: (size and time of the local one, what the bucket knows of its own).
    self._equal: dict[str, tuple[Any, str]] = {}
    with self._user_errors('read'):
      files, root = url_to_fs(self._url, use_listings_cache=False)
      self._bucket = DirFileSystem(path=root, fs=files)
      self._bucket.find('')

  @contextlib.contextmanager
  def _user_errors(self, verb: str) -> Iterator[None]:
    try:
      yield
    except lock.LockedError:
      raise
    except Exception as error:  # every file system has its own classes
      is_missing = isinstance(error, ImportError) and self._url.startswith('gs://')
      fix = '; pip install gcsfs' if is_missing else ''
      raise UserError(
        f'--workdir={self._url} cannot be {verb}: {first_line(error)}{fix}.'
      ) from error

  @contextlib.contextmanager
  def hold_lock(self, workdir: Path) -> Iterator[None]:
    """Holds the bucket's directory, and makes the local one equal to it."""
    try:
      epath.Path(self._url)
    except KeyError:
      raise UserError(
        f'--workdir={self._url} cannot hold training states; give gs:// or a local directory.'
      ) from None
    with contextlib.ExitStack() as stack:
      with self._user_errors('written'):
        stack.enter_context(lock.lock_bucket(self._bucket, self._url))
      processes.barrier('locked')
      with self._user_errors('read'):
        self.pull()
      yield

  def checkpoint_dir(self, stage: Path) -> epath.Path:
    """Returns a directory per stage and key, so that other settings never find these states."""
    return epath.Path(self._url) / STATES / stage.name / key_fingerprint(stage)

  def pull(self) -> None:
    """Makes the local directory equal to the bucket."""
    listing = self._bucket.find('', detail=True).items()
    infos = {name: str(info) for name, info in listing if _is_copied(name)}
    changed = [n for n, info in infos.items() if self._equal.get(n) != (self._stamp(n), info)]
    for name in changed:
      (self._local / name).parent.mkdir(parents=True, exist_ok=True)
    if changed:
      self._bucket.get(changed, [str(self._local / name) for name in changed])
    for name in self._local_names() - infos.keys():
      (self._local / name).unlink()
    self._equal = {name: (self._stamp(name), info) for name, info in infos.items()}

  def push(self) -> None:
    """Makes the bucket equal to the local directory; uploads the files that have changed."""
    stamps = {name: self._stamp(name) for name in self._local_names()}
    changed = {n for n, stamp in stamps.items() if self._equal.get(n, (None,))[0] != stamp}
    removed = self._equal.keys() - stamps.keys()
    # A stage is uploaded before its <stage>.old changes: until then the bucket can resume the old.
    stages = {_stage_name(name) for name in changed | removed}
    for stage in sorted(stages, key=lambda name: (not name, name.endswith('.old'), name)):
      uploads, removals = (
        [name for name in sorted(names) if _stage_name(name) == stage]
        for names in (changed, removed)
      )
      self._push_stage(stage, uploads, removals)
      self._equal |= {name: (stamps[name], '') for name in uploads}

  def _push_stage(self, stage: str, uploads: list[str], removals: list[str]) -> None:
    record = f'{stage}/{stage_record.FILE}'
    new_key = stage_record.stored_key(self._local / stage)
    if record in removals or (record in uploads and self._key_on_bucket(record) != new_key):
      self._remove([record])
    # The record comes last, by a call of its own: within a call files have no order.
    for names in ([name for name in uploads if name != record], [record] * (record in uploads)):
      if names:
        self._bucket.put([str(self._local / name) for name in names], names)
    self._remove(removals)

  def try_push(self) -> bool:
    """Pushes; a failure is logged, and is an OSError after `max_failures` in succession."""
    return processes.broadcast_from_first(self._try() if processes.is_first() else True)

  def push_and_wait(self, *stages: Path) -> None:
    """Pushes, with at most `max_failures` retries; then the other processes pull.

    Args:
      stages: stages whose training states of replaced settings are removed.
    """
    if processes.is_first():
      pause = _RETRY_PAUSE
      while not self._try():
        time.sleep(pause)
        pause *= 2
      for stage in stages:
        self._remove_replaced_states(stage)
    processes.barrier('published')
    if not processes.is_first():
      self.pull()

  def _try(self) -> bool:
    try:
      self.push()
    except Exception as error:
      self._failures += 1
      message = f'--workdir={self._url} cannot be written: {first_line(error)}'
      if self._failures > self._max_failures:
        raise OSError(f'{message}; run the same command again once it can be.') from error
      self._log(f'warning: {message}; trying again later')
      return False
    self._failures = 0
    return True

  def _remove_replaced_states(self, stage: Path) -> None:
    current = {key_fingerprint(path) for path in (stage, stage.with_name(f'{stage.name}.old'))}
    directory = f'{STATES}/{stage.name}'
    for path in self._bucket.ls(directory, detail=False) if self._bucket.exists(directory) else ():
      if path.rstrip('/').rpartition('/')[2] not in current:
        self._bucket.rm(path, recursive=True)

  def _remove(self, names: Iterable[str]) -> None:
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        self._bucket.rm_file(name)
      self._equal.pop(name, None)

  def _local_names(self) -> set[str]:
    paths = [path for path in self._local.rglob('*') if path.is_file()]
    return set(filter(_is_copied, (path.relative_to(self._local).as_posix() for path in paths)))

  def _stamp(self, name: str) -> Any:
    """Returns size and time of a local file, None if there is none."""
    with contextlib.suppress(FileNotFoundError):
      stat = (self._local / name).stat()
      return stat.st_size, stat.st_mtime_ns

  def _key_on_bucket(self, record: str) -> Any:
    """Returns the key that a stage has on the bucket, None if it has none."""
    with contextlib.suppress(FileNotFoundError, ValueError):
      return json.loads(self._bucket.cat_file(record)).get('key')


def local_directory(url: str, root: str, index: int) -> Path:
  """Returns the directory under `root` in which process `index` keeps its copy of a bucket's."""
  name = url.rstrip('/').rpartition('/')[2]
  digest = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]
  return Path(root).expanduser() / (f'{name}-{digest}' + (f'-{index}' if index else ''))


def key_fingerprint(stage: Path) -> str:
  """Returns 16 hexadecimal digits that stand for the key of a stage."""
  text = json.dumps(stage_record.stored_key(stage), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stage_name(name: str) -> str:
  """Returns the stage that a file belongs to; '' for files of the run."""
  return name.partition('/')[0] if '/' in name else ''


def _is_copied(name: str) -> bool:
  """Returns whether a file is copied: training states, locks and partial files are not."""
  parts = name.split('/')
  is_partial = any(part.endswith('.partial') for part in parts)
  return name not in ('', lock.FILE) and STATES not in parts and not is_partial
