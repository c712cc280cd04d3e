"""Opens files, saved datasets and datasets of the hub as unchanged rows.

Rows are interpreted by `segjax.data.sources`.
"""

import functools
import gzip
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from segjax.data import arrow_store, json_rows
from segjax.errors import UserError

SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.parquet')
KINDS = ', '.join(SUFFIXES)
_SHARD = re.compile(r'(.+)-(\d{5})-of-(\d{5})')
_SAVED = ('dataset_info.json', 'dataset_dict.json', 'state.json')  # any of them
_UNCHECKED_BYTES = 64 << 20  # of a parquet file, whose ratio to the file's size does not matter
_BATCH = 1024  # rows of a parquet file decoded at once


class Opened(NamedTuple):
  """Rows of a file: a list or a memory-mapped dataset; its name in errors."""

  rows: Any
  name: str


# Opens the files of a split; limit (0: none) is the number of rows to read from the front of each.
Opener = Callable[[int], list[Opened]]


class Stamp(NamedTuple):
  """A file with its size, time and number; another file, or another content, has another stamp."""

  path: str
  size: int
  time: float
  number: int = 0


def stamps(path: epath.Path) -> list[Stamp]:
  """Returns the stamp of a file, or of each file in a directory."""
  return [_stamp(entry) for entry in _files(path)] if path.is_dir() else [_stamp(path)]


def _files(directory: epath.Path) -> Iterator[epath.Path]:
  """Yields the files below a directory, in order; epath knows no recursive patterns."""
  for entry in sorted(directory.iterdir()):
    if not entry.is_dir():
      yield entry
    elif '://' in str(entry) or not os.path.islink(entry):  # which may lead back
      yield from _files(entry)


def _stamp(path: epath.Path) -> Stamp:
  if '://' in str(path):
    stat = path.stat()
    return Stamp(str(path), stat.length, stat.mtime)
  local = os.stat(path)
  return Stamp(os.path.abspath(path), local.st_size, local.st_mtime_ns, local.st_ino)


def find_splits(path: epath.Path, drop_bad: bool = False) -> dict[str, Opener]:
  """Returns what opens each split of a file or directory.

  A file is the split 'train' and the one that its name says.

  Args:
    path: a file or a directory.
    drop_bad: lines that are not JSON take their places as errors instead of being raised.

  Raises:
    UserError: the file is of an unknown kind; the directory's files contradict each other.
  """
  if path.is_dir():
    return _find_in_directory(path, drop_bad)
  if not path.name.endswith(SUFFIXES):
    raise UserError(f'{path}: unknown kind of file; provide {KINDS}.')
  opener = functools.partial(_open_all, [path], drop_bad)
  shard = _SHARD.fullmatch(_stem(path))
  return {name: opener for name in ('train', shard[1] if shard else _stem(path))}


def from_hub(name: str, split: str, limit: int) -> Opened:
  """Opens a hub id, or the directory of a downloaded repository, by the `datasets` library."""
  import datasets

  try:
    data = datasets.load_dataset(name, split=split)
  except Exception as error:  # the library passes on those of its readers and of the network
    reason = _reason(error)
    raise UserError(f'{name}: datasets cannot load split {split!r}: {reason}') from error
  return Opened(_front(data, limit), name)


def _find_in_directory(path: epath.Path, drop_bad: bool) -> dict[str, Opener]:
  """Returns the splits of a saved dataset, or of files named after them, here or in data/."""
  if any((path / name).exists() for name in _SAVED):
    return _find_saved(path)
  names: dict[str, list[epath.Path]] = defaultdict(list)
  for folder in (path, path / 'data'):
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in (e for e in entries if e.name.endswith(SUFFIXES)):
      shard = _SHARD.fullmatch(_stem(entry))
      names[shard[1] if shard else _stem(entry)].append(entry)
  for name, entries in names.items():
    _check_shards(path, name, entries)
  return {n: functools.partial(_open_all, files, drop_bad) for n, files in names.items()}


def _check_shards(path: epath.Path, name: str, entries: Sequence[epath.Path]) -> None:
  """Raises UserError unless files are one split: a single file, or all shards of one number."""
  shards = [_SHARD.fullmatch(_stem(entry)) for entry in entries]
  if len(entries) > 1 and (not all(shards) or len({shard[3] for shard in shards}) > 1):
    listed = ', '.join(entry.name for entry in entries[:4])
    raise UserError(
      f'{path}: several files hold the split {name!r}: {listed}; remove all but one, or give the '
      'path of the file itself.'
    )
  if shards[0] and len(entries) != int(shards[0][3]):
    raise UserError(
      f'{path}: the split {name!r} has {len(entries)} of {int(shards[0][3])} shards; download the '
      'others, or give the paths of the files themselves, joined by commas.'
    )


def _open_all(paths: Sequence[epath.Path], drop_bad: bool, limit: int) -> list[Opened]:
  opened = []
  for path in paths:
    # etils counts devices and pipes as files, and a pipe would wait for a writer.
    if '://' not in str(path) and not Path(path).is_file():
      raise UserError(f'{path}: a pipe or device, which cannot be read twice; save it as a file.')
    is_parquet = path.suffix == '.parquet'
    rows = _from_parquet(path, limit) if is_parquet else _from_json(path, limit, drop_bad)
    opened.append(Opened(rows, path.name))
  return opened


def _from_json(path: epath.Path, limit: int, drop_bad: bool) -> Any:
  is_packed = path.suffix == '.gz'
  with path.open('rb') as raw, gzip.open(raw) if is_packed else raw as stream:
    try:
      bounded = json_rows.BoundedStream(path, stream, raw if is_packed else None)
      return json_rows.read_rows(bounded, limit, drop_bad)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise UserError(f'{path}: invalid gzip file ({error}); copy it again.') from error


def _find_saved(path: epath.Path) -> dict[str, Opener]:
  import datasets

  try:
    data = datasets.load_from_disk(str(path))
  except Exception as error:  # the library passes on those of its readers
    raise UserError(
      f'{path}: datasets cannot load this directory: {_reason(error)}; save it again.'
    ) from error
  if isinstance(data, datasets.DatasetDict):
    return {name: functools.partial(_open_saved, data[name], path) for name in data}
  opener = functools.partial(_open_saved, data, path)
  return {name: opener for name in ('train', str(data.split or 'train'))}


def _open_saved(data: Any, path: epath.Path, limit: int) -> list[Opened]:
  data = _front(data, limit)
  _validate(data.data, path)
  return [Opened(data, path.name)]


def _from_parquet(path: epath.Path, limit: int) -> Any:
  import datasets
  import pyarrow.parquet

  size = path.stat().length
  table, num_bytes, num_rows = arrow_store.TableStore(), 0, 0
  with path.open('rb') as stream:
    try:
      file = pyarrow.parquet.ParquetFile(stream)
      _check_row_groups(file.metadata, path)
      for batch in file.iter_batches(_BATCH):
        table.append(batch)
        num_bytes += batch.nbytes
        num_rows += len(batch)
        if num_bytes > max(_UNCHECKED_BYTES, json_rows.MAX_RATIO * size):
          raise UserError(json_rows.describe_ratio(path, size, num_bytes))
        if limit and num_rows >= limit:
          break
      table = table.finish(file.schema_arrow)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
      raise UserError(
        f'{path}: not a parquet file, or damaged: {_reason(error)}; copy it again.'
      ) from error
  _validate(table, path)
  return _front(datasets.Dataset(datasets.table.InMemoryTable(table)), limit)


def _check_row_groups(metadata: Any, path: epath.Path) -> None:
  """Raises UserError if rows are too large, before any of them is unpacked."""
  for index in range(metadata.num_row_groups):
    group = metadata.row_group(index)
    if group.total_byte_size > max(group.num_rows, 1) * json_rows.MAX_ROW_BYTES:
      raise UserError(
        f'{path}: rows longer than {json_rows.MAX_ROW_BYTES >> 20} MiB; no row may be, so shorten '
        'or remove them.'
      )


def _validate(table: Any, path: epath.Path) -> None:
  """Raises UserError if texts or offsets of a table are damaged: reading them could crash."""
  try:
    (table.table if hasattr(table, 'table') else table).validate(full=True)
  except Exception as error:
    raise UserError(f'{path}: the rows are damaged: {_reason(error)}; copy it again.') from error


def _front(data: Any, limit: int) -> Any:
  return data.select(range(min(limit, len(data)))) if limit else data


def _stem(path: epath.Path) -> str:
  """Returns the name without the suffix of its kind."""
  suffix = max((s for s in SUFFIXES if path.name.endswith(s)), key=len)
  return path.name.removesuffix(suffix)


def _reason(error: BaseException) -> str:
  """Returns an error's message in one line of at most 300 characters; its class if it has none."""
  # Its message is always the same.
  while type(error).__name__ == 'DatasetGenerationError' and error.__cause__:
    error = error.__cause__
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else text[:297] + '...'
