"""Opens files, saved datasets and datasets of the hub as unchanged rows.

Rows are interpreted by `segjax.data.sources`.
"""

import gzip
import json
from typing import Any

from etils import epath

from segjax.errors import UserError

Row = dict[str, Any]
Opened = tuple[Any, str]  # a list of rows or a memory-mapped dataset; its name in errors

SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.parquet')
KINDS = ', '.join(SUFFIXES)


def from_directory(path: epath.Path, split: str, limit: int) -> Opened:
  """Opens a saved dataset, one file per split, or the shards of a downloaded hub repository."""
  if any((path / name).exists() for name in ('dataset_info.json', 'dataset_dict.json')):
    return _from_saved(path, split, limit)
  files = {
    entry.name.removesuffix(suffix): entry
    for suffix in SUFFIXES
    for entry in sorted(path.glob(f'*{suffix}'))
  }
  if split in files:
    return from_file(files[split], limit)
  if list(path.glob('*-of-*')) or list(path.glob('data/*-of-*')):
    return from_hub(str(path), split, limit)
  has = ', '.join(sorted(files)) or f'no {KINDS} file and is not a saved dataset'
  raise UserError(f'{path}: no split {split!r}; it has {has}.')


def from_file(path: epath.Path, limit: int) -> Opened:
  """Opens one file, whose kind is determined by its suffix."""
  if not path.name.endswith(SUFFIXES):
    raise UserError(f'{path}: unknown kind of file; provide {KINDS}.')
  if path.name.endswith('.parquet'):
    return _from_parquet(path, limit)
  with path.open('rb') as raw, gzip.open(raw) if path.suffix == '.gz' else raw as stream:
    try:
      return _read_json(stream, path, limit), path.name
    except (EOFError, gzip.BadGzipFile) as error:
      raise UserError(f'{path}: invalid gzip file: {error}') from error


def from_hub(name: str, split: str, limit: int) -> Opened:
  """Opens a hub id, or the directory of a downloaded repository, by the `datasets` library."""
  import datasets

  try:
    data = datasets.load_dataset(name, split=split)
  except (OSError, ValueError) as error:  # OSError covers not found and no connection
    raise UserError(f'{name}: datasets cannot load split {split!r}: {error}') from error
  return _front(data, limit), name


def excerpt(value: Any) -> str:
  """Returns a value as text of at most 60 characters, for errors."""
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _from_saved(path: epath.Path, split: str, limit: int) -> Opened:
  import datasets

  data = datasets.load_from_disk(str(path))
  if isinstance(data, datasets.DatasetDict):
    if split not in data:
      raise UserError(f'{path}: no split {split!r}; it has {", ".join(sorted(data))}.')
    data = data[split]
  return _front(data, limit), path.name


def _from_parquet(path: epath.Path, limit: int) -> Opened:
  import datasets
  import pyarrow.parquet

  with path.open('rb') as stream:
    try:
      table = pyarrow.parquet.read_table(stream)
    except pyarrow.ArrowInvalid as error:
      raise UserError(f'{path}: not a parquet file: {error}') from error
  data = datasets.Dataset(datasets.table.InMemoryTable(table))
  return _front(data, limit), path.name


def _front(data: Any, limit: int) -> Any:
  return data.select(range(min(limit, len(data)))) if limit else data


def _read_json(stream: Any, path: epath.Path, limit: int) -> list[Row]:
  """Reads one JSON object per line, without blank lines, or one JSON array of objects."""
  rows = []
  for line in stream:
    if not line.strip():
      continue
    if not rows and line.lstrip().startswith(b'['):
      rows = _parse(line + stream.read(), str(path))[: limit or None]
      break
    rows.append(_parse(line, f'{path}, row {len(rows) + 1}'))
    if len(rows) == limit:
      break
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise UserError(f'{path}, row {number}: must be a JSON object, not {excerpt(row)}.')
  return rows


def _parse(text: bytes, location: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    line = excerpt(text.decode('utf-8', 'replace'))
    raise UserError(f'{location}: not JSON: {error}; the line is {line}.') from error
