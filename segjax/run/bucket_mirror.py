"""Copies between a working directory on a bucket and the local directory that a run works in.

Buckets have no appends and no renames of directories, and models and metrics are written to local
files. Training states do not pass through here: they go to the bucket directly (`checkpoint_dir`).
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from segjax import processes
from segjax.errors import UserError, first_line
from segjax.run import bucket_lock, lock, stage_record
from segjax.storage import write_text_atomically

STATES = 'checkpoints'  # training states: <stage>/<fingerprint of its key>

_INDEX = 'mirror.json'  # in the local directory: the versions of the last push or pull
_RETRY_PAUSE = 1.0  # seconds; doubled with each failure of a push that must succeed


class NoMirror:
  """Does nothing: the mirror of a run whose working directory is local."""

  def checkpoint_dir(self, _: Path) -> epath.Path | None:
    """Returns where the training states of a stage go; None: to its own directory."""

  def try_push(self) -> bool:
    """Returns whether the bucket has all files; if it cannot be written, a later push retries."""
    return True

  def push_and_wait(self, *_: Path) -> None:
    """Returns once the bucket has all files and all processes have copied them from there."""

  def push_last(self) -> None:
    """Copies what a run that stops leaves, such as its report, to the bucket."""

  def hold_lock(self, workdir: Path) -> contextlib.AbstractContextManager[Any]:
    """Holds the working directory for this run."""
    return lock.lock_workdir(workdir)


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

  def __init__(self, url: str, local: Path, max_failures: int, log_fn: Callable[[str], None]):
    self._url, self._local = url.rstrip('/'), local
    self._copy = fsspec.filesystem('dir', path=str(local), target_protocol='file')
    self._max_failures, self._failures, self._log = max_failures, 0, log_fn
    self._equal: dict[str, list[str]] = {}  # versions (local, bucket) of the files that are equal
    # Without an index every file counts as changed and is copied again.
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
      self._equal = _check_index(json.loads((local / _INDEX).read_text(encoding='utf-8')))
    with self._user_errors('read'):
      # A cached listing would hide what other machines have written.
      files, root = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
      self._bucket = fsspec.filesystem('dir', path=root, fs=files)
      _versions(self._bucket)  # the first access: raises if it cannot be read

  @contextlib.contextmanager
  def _user_errors(self, verb: str) -> Iterator[None]:
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # every file system has its own classes
      raise UserError(f'--workdir={self._url} cannot be {verb}: {first_line(error)}') from error

  @contextlib.contextmanager
  def hold_lock(self, workdir: Path) -> Iterator[None]:
    """Holds the bucket's directory, and makes the local one equal to it."""
    try:
      epath.Path(self._url)
    except KeyError:
      raise UserError(
        f'--workdir={self._url} cannot hold training states; use gs:// or a local directory.'
      ) from None
    with contextlib.ExitStack() as stack:
      # The local lock ends with its process: it shows whether the bucket's holder was killed here.
      holder, killed = stack.enter_context(lock.lock_workdir(workdir, self._url))
      if processes.is_first():
        with self._user_errors('written'):
          stack.enter_context(bucket_lock.lock_bucket(self._bucket, self._url, holder, killed))
      processes.barrier('locked')  # nobody reads before the first process holds the lock
      with self._user_errors('read'):
        self.pull()
      yield

  def checkpoint_dir(self, stage: Path) -> epath.Path:
    """Returns a directory per stage and key, so that other settings never find these states."""
    return epath.Path(self._url) / STATES / stage.name / key_fingerprint(stage)

  def pull(self) -> None:
    """Makes the local directory equal to the bucket; downloads the files that differ."""
    ours, theirs = _versions(self._copy), _versions(self._bucket)
    changed = [n for n in theirs if self._equal.get(n) != [ours.get(n), theirs[n]]]
    self._bucket.get(changed, [str(self._local / name) for name in changed])
    # Left by a run that was killed before it pushed them: the bucket wins.
    for name in ours.keys() - theirs.keys():
      (self._local / name).unlink()
    self._save_index(_versions(self._copy), theirs)

  def push(self) -> None:
    """Makes the bucket equal to the local directory; uploads the files that have changed."""
    ours = _versions(self._copy)
    changed = [n for n in ours if self._equal.get(n, [''])[0] != ours[n]]
    removed = self._equal.keys() - ours.keys()
    # <stage>.old comes last: a run killed while it restores <stage>.old can resume from there.
    stages = {name.partition('/')[0] for name in (*changed, *removed)}
    for stage in sorted(stages, key=lambda name: (name.endswith('.old'), name)):
      uploads, removals = (
        [name for name in names if name.partition('/')[0] == stage] for names in (changed, removed)
      )
      record, key = f'{stage}/{stage_record.FILE}', stage_record.stored_key(self._local / stage)
      if record in (*uploads, *removals) and self._key_on_bucket(record) != key:
        # A run of the new key must not resume from files of the old one, nor the other way round.
        self._remove([record, *removals])
        removals = []
      # The record comes last, by a call of its own: within a call files have no order.
      for names in ([name for name in uploads if name != record], [record] * (record in uploads)):
        self._bucket.put([str(self._local / name) for name in names], names)
      self._remove(removals)  # after uploads: a killed push leaves too much, never too little
      # After each stage: a push that fails later does not upload this one again.
      self._equal |= {name: [ours[name], ''] for name in uploads}
    self._save_index(ours, _versions(self._bucket))

  def try_push(self) -> bool:
    """Pushes; logs a failure, raises UserError if more than `max_failures` follow each other."""
    if processes.is_first():
      try:
        self.push()
        self._failures = 0
      except Exception as error:
        self._failures += 1
        message = f'--workdir={self._url} cannot be written: {first_line(error)}'
        if self._failures > self._max_failures:
          raise UserError(f'{message}; run the same command again when it can be.') from error
        self._log(f'warning: {message}; trying again later')
    # All processes have to agree whether to save, which is collective.
    return processes.broadcast_from_first(not self._failures)

  def push_and_wait(self, *stages: Path) -> None:
    """Pushes, with at most `max_failures` retries; then the other processes pull.

    Removes the training states of `stages` that belong to replaced settings.
    """
    while not self.try_push():
      time.sleep(_RETRY_PAUSE * 2**self._failures)
    if not processes.is_first():
      self.pull()
    for stage in stages if processes.is_first() else ():
      # `.old` may be restored: its training states stay.
      current = {key_fingerprint(path) for path in (stage, stage.with_name(f'{stage.name}.old'))}
      with contextlib.suppress(FileNotFoundError):
        for path in self._bucket.ls(f'{STATES}/{stage.name}', detail=False):
          if path.rstrip('/').rpartition('/')[2] not in current:
            self._bucket.rm(path, recursive=True)

  def push_last(self) -> None:
    """Pushes, waiting for no other process; logs a failure, so that the run's error is raised."""
    if processes.is_first():
      try:
        self.push()
      except Exception as error:
        self._log(f'warning: --workdir={self._url} cannot be written: {first_line(error)}')

  def _remove(self, names: list[str]) -> None:
    for name in names:
      # Removed already by a push that was killed.
      with contextlib.suppress(FileNotFoundError):
        self._bucket.rm_file(name)

  def _save_index(self, ours: dict[str, str], theirs: dict[str, str]) -> None:
    self._equal = {name: [ours.get(name, ''), version] for name, version in theirs.items()}
    # An index that claims too much would skip an upload: it is written after the copies.
    write_text_atomically(self._local / _INDEX, json.dumps(self._equal))

  def _key_on_bucket(self, record: str) -> Any:
    """Returns the key that a stage has on the bucket, None if it has none."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError, AttributeError):
      return json.loads(self._bucket.cat_file(record)).get('key')


def _check_index(index: Any) -> dict[str, list[str]]:
  """Returns the index; raises ValueError if it is not one that `_save_index` wrote."""
  pairs = index.values() if isinstance(index, dict) else [None]
  if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
    raise ValueError(f'{_INDEX} is damaged')
  return index


def local_directory(url: str, root: str, index: int) -> Path:
  """Returns the directory under `root` in which process `index` keeps its copy of a bucket."""
  url, suffix = url.rstrip('/'), f'-{index}' if index else ''
  return Path(root).expanduser() / f'{url.rpartition("/")[2]}-{_digest(url)[:12]}{suffix}'


def key_fingerprint(stage: Path) -> str:
  """Returns 16 hexadecimal digits that stand for the key of a stage."""
  return _digest(json.dumps(stage_record.stored_key(stage), sort_keys=True))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(files: Any) -> dict[str, str]:
  """Returns, for each file to copy, a digest of what its file system lists: size, time and more.

  Training states, the lock, the index and partial files are not copied.
  """
  versions = {}
  for name, info in files.find('', detail=True).items():
    is_skipped = name in ('', lock.FILE, _INDEX) or '.partial' in name
    if not is_skipped and STATES not in name.split('/'):
      versions[name] = _digest(str(info))
  return versions
