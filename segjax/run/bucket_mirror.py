"""A run whose working directory is on a bucket works in a local copy, which this keeps equal to it.

Buckets know no appends and no renames of directories, and weights and curves are written to local
files. Training states do not pass through here: they go straight to the bucket (`states`).
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from segjax import processes
from segjax.errors import UserError, first_line
from segjax.run import lock, stage_record

INDEX = 'mirror.json'  # SHA-256 of every file; not there where a push was cut off
STATES = 'checkpoints'  # training states: <stage>/<fingerprint of its key>

_PAUSE = 2.0  # seconds before a push that must succeed is tried again, twice as many each time


class NoMirror:
  """What there is to keep equal where the working directory is no bucket: nothing."""

  def states(self, stage: Path) -> epath.Path | None:
    """Where the training states of a stage go; None: its own directory."""
    del stage

  def offer(self) -> bool:
    """Whether the bucket has all files; where it could not be written, they are kept for later."""
    return True

  def publish(self, *_: Path) -> None:
    """Returns once the bucket has all files, and all processes have them from there."""

  @contextlib.contextmanager
  def held(self, workdir: Path) -> Iterator[None]:
    """Holds the working directory for this run."""
    with lock.lock_workdir(workdir):
      yield


class BucketMirror(NoMirror):
  """Keeps a bucket and a local directory equal; the bucket is right where they differ at the start.

  Files go there before the `stage.json` that vouches for them, and one whose key changes is taken
  away first: so a run that is killed at any moment leaves a bucket that its command goes on from.

  Args:
    url: as gs://bucket/run.
    local: the directory of this process.
    max_misses: pushes in a row that may fail.
    say: is told what went wrong and was survived.

  Raises:
    ValueError: the bucket cannot be read.
  """

  def __init__(self, url: str, local: Path, max_misses: int, say: Callable[[str], None] = print):
    from fsspec.core import url_to_fs

    self._url, self._local = url.rstrip('/'), local
    self._max_misses, self._misses, self._say = max_misses, 0, say
    self._known: dict[str, str] = {}  # of the bucket's files the SHA-256
    self._hashed: dict[str, tuple[Any, str]] = {}  # of local files size and time, and SHA-256
    self._is_whole = False  # whether the index on the bucket is that of its files
    with self._reached('read'):
      self._files, self._root = url_to_fs(self._url, use_listings_cache=False)
      self._theirs()

  @contextlib.contextmanager
  def _reached(self, verb: str) -> Iterator[None]:
    try:
      yield
    except lock.LockedError:
      raise
    except Exception as error:  # each kind of bucket has its own
      is_missing = isinstance(error, ImportError) and self._url.startswith('gs://')
      package = " (pip install -e '.[gcs]')" if is_missing else ''
      raise UserError(
        f'--workdir={self._url} cannot be {verb}: {first_line(error)}{package}'
      ) from error

  @contextlib.contextmanager
  def held(self, workdir: Path) -> Iterator[None]:
    """Holds the bucket's directory, and makes the local one equal to it."""
    self._check_states()
    with contextlib.ExitStack() as stack:
      with self._reached('written'):
        stack.enter_context(lock.lock_bucket(self._files, self._at(lock.FILE), self._url))
      processes.barrier('locked')
      with self._reached('read'):
        self.pull()
      yield

  def states(self, stage: Path) -> epath.Path:
    """By stage and key: what was made with other settings is never in the way."""
    return epath.Path(self._url) / STATES / stage.name / _fingerprint(stage)

  def _check_states(self) -> None:
    try:
      epath.Path(self._url)
    except KeyError:
      raise UserError(
        f'--workdir={self._url}: training states cannot go there; give gs:// or a directory.'
      ) from None

  def pull(self) -> None:
    """Makes the local directory equal to the bucket."""
    index = self._index()
    self._known, self._is_whole = {}, bool(index)
    theirs = self._theirs()
    for name in theirs:
      path = self._local / name
      if name not in index or not path.is_file() or self._hash(name) != index[name]:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(self._at(name), str(path))
      self._known[name] = self._hash(name)
    for name in set(self._mine()) - set(theirs):
      (self._local / name).unlink()

  def push(self) -> None:
    """Makes the bucket equal to the local directory: what changed, and what is gone."""
    mine = {name: self._hash(name) for name in self._mine()}
    changed = {name for name, digest in mine.items() if self._known.get(name) != digest}
    gone = self._known.keys() - mine.keys()
    if not changed and not gone and self._is_whole:
      return
    self._is_whole = False
    self._remove(INDEX)
    # What a run needs to go on is there before what it was moved away from changes.
    tops = {_top(name) for name in changed | gone}
    for top in sorted(tops, key=lambda top: (not top, top.endswith('.old'), top)):
      new, lost = ([n for n in sorted(names) if _top(n) == top] for names in (changed, gone))
      self._push_stage(top, new, lost, mine)
    self._files.pipe_file(self._at(INDEX), json.dumps(self._known, indent=1).encode())
    self._is_whole = True

  def _push_stage(
    self, top: str, changed: list[str], gone: list[str], digests: dict[str, str]
  ) -> None:
    record = f'{top}/{stage_record.FILE}'
    if record in gone or (record in changed and self._key(record) != self._own_key(top)):
      self._remove(record)
    for name in sorted(changed, key=lambda name: (name == record, name)):
      self._files.put_file(str(self._local / name), self._at(name))
      self._known[name] = digests[name]
    for name in gone:
      self._remove(name)

  def offer(self) -> bool:
    """Pushes; a failure is told, and raises OSError after more than `max_misses` in a row."""
    return processes.broadcast_from_first(self._try() if processes.is_first() else True)

  def publish(self, *stages: Path) -> None:
    """Pushes until it succeeds, at most `max_misses` times more; the other processes pull.

    Args:
      stages: whose training states of keys long replaced are removed.
    """
    if processes.is_first():
      pause = _PAUSE
      while not self._try():
        time.sleep(pause)
        pause *= 2
      for stage in stages:
        self._forget(stage)
    processes.barrier('published')
    if not processes.is_first():
      self.pull()

  def _try(self) -> bool:
    try:
      self.push()
    except Exception as error:
      self._misses += 1
      text = f'{self._url} could not be written: {first_line(error)}'
      if self._misses > self._max_misses:
        raise OSError(f'{text}. Start the same command again once it can be.') from error
      self._say(f'warning: {text}; tried again')
      return False
    self._misses = 0
    return True

  def _forget(self, stage: Path) -> None:
    known = {_fingerprint(path) for path in (stage, stage.with_name(f'{stage.name}.old'))}
    place = self._at(f'{STATES}/{stage.name}')
    for path in self._files.ls(place, detail=False) if self._files.exists(place) else ():
      if path.rstrip('/').rpartition('/')[2] not in known:
        self._files.rm(path, recursive=True)

  def _at(self, name: str) -> str:
    return f'{self._root.rstrip("/")}/{name}'

  def _theirs(self) -> list[str]:
    names = [path[len(self._at('')) :] for path in self._files.find(self._root)]
    return sorted(name for name in names if _is_mirrored(name))

  def _mine(self) -> list[str]:
    paths = [path for path in self._local.rglob('*') if path.is_file()]
    names = [path.relative_to(self._local).as_posix() for path in paths]
    return sorted(name for name in names if _is_mirrored(name))

  def _hash(self, name: str) -> str:
    path = self._local / name
    stat = path.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
    if self._hashed.get(name, (None,))[0] != stamp:
      with path.open('rb') as file:
        self._hashed[name] = (stamp, hashlib.file_digest(file, 'sha256').hexdigest())
    return self._hashed[name][1]

  def _index(self) -> dict[str, str]:
    try:
      return json.loads(self._files.cat_file(self._at(INDEX)))
    except FileNotFoundError:
      return {}

  def _key(self, record: str) -> Any:
    """The key on the bucket, None where there is none."""
    try:
      return json.loads(self._files.cat_file(self._at(record))).get('key')
    except (FileNotFoundError, ValueError):
      return None

  def _own_key(self, top: str) -> Any:
    return stage_record.stored_key(self._local / top)

  def _remove(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._files.rm_file(self._at(name))
    self._known.pop(name, None)


def local_directory(url: str, root: str, index: int) -> Path:
  """Where a process keeps its copy of a bucket's directory: of its own, under `root`."""
  name = url.rstrip('/').rpartition('/')[2]
  digest = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]
  return Path(root).expanduser() / (f'{name}-{digest}' + (f'-{index}' if index else ''))


def _top(name: str) -> str:
  """The stage whose file it is; '' for those of the run."""
  return name.partition('/')[0] if '/' in name else ''


def _is_mirrored(name: str) -> bool:
  parts = name.split('/')
  is_ours = parts[0] not in (STATES, INDEX, lock.FILE) and STATES not in parts
  return bool(name) and is_ours and not any(part.endswith('.partial') for part in parts)


def _fingerprint(stage: Path) -> str:
  text = json.dumps(stage_record.stored_key(stage), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
