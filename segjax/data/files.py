"""What lies in a file, a saved dataset or a dataset of the hub: rows as they stand.

What a row means is not read here: that is `segjax.data.sources`.
"""

import gzip
import json
from typing import Any

from etils import epath

from segjax.errors import UserError

Row = dict[str, Any]
Opened = tuple[Any, str]  # a list of rows or a memory-mapped dataset; what to call it in an error

SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.parquet')
KINDS = ', '.join(SUFFIXES)


def from_directory(place: epath.Path, split: str, limit: int) -> Opened:
  """A saved dataset, one file per split, or the shards of a downloaded hub repository."""
  if any((place / name).exists() for name in ('dataset_info.json', 'dataset_dict.json')):
    return _from_saved(place, split, limit)
  files = {
    entry.name.removesuffix(suffix): entry
    for suffix in SUFFIXES
    for entry in sorted(place.glob(f'*{suffix}'))
  }
  if split in files:
    return from_file(files[split], limit)
  if list(place.glob('*-of-*')) or list(place.glob('data/*-of-*')):
    return from_hub(str(place), split, limit)
  has = ', '.join(sorted(files)) or f'no {KINDS} file and is no saved dataset'
  raise UserError(f'{place}: no split {split!r}; it has {has}.')


def from_file(place: epath.Path, limit: int) -> Opened:
  """One file, of the kind that its name says."""
  if not place.name.endswith(SUFFIXES):
    raise UserError(f'{place}: unknown kind of file; give {KINDS}.')
  if place.name.endswith('.parquet'):
    return _from_parquet(place, limit)
  with place.open('rb') as raw, gzip.open(raw) if place.suffix == '.gz' else raw as stream:
    try:
      return _read_json(stream, place, limit), place.name
    except (EOFError, gzip.BadGzipFile) as error:
      raise UserError(f'{place}: broken gzip file: {error}') from error


def from_hub(path: str, split: str, limit: int) -> Opened:
  """What `datasets` finds under that hub id, or in the directory of a downloaded repository."""
  import datasets

  try:
    data = datasets.load_dataset(path, split=split)
  except (OSError, ValueError) as error:  # OSError covers not found and no connection
    raise UserError(f'{path}: datasets cannot load split {split!r}: {error}') from error
  return _front(data, limit), path


def excerpt(value: Any) -> str:
  """A value as an error shows it: at most 60 characters."""
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _from_saved(place: epath.Path, split: str, limit: int) -> Opened:
  import datasets

  data = datasets.load_from_disk(str(place))
  if isinstance(data, datasets.DatasetDict):
    if split not in data:
      raise UserError(f'{place}: no split {split!r}; it has {", ".join(sorted(data))}.')
    data = data[split]
  return _front(data, limit), place.name


def _from_parquet(place: epath.Path, limit: int) -> Opened:
  import datasets
  import pyarrow.parquet

  with place.open('rb') as stream:
    try:
      table = pyarrow.parquet.read_table(stream)
    except pyarrow.ArrowInvalid as error:
      raise UserError(f'{place}: not a parquet file: {error}') from error
  data = datasets.Dataset(datasets.table.InMemoryTable(table))
  return _front(data, limit), place.name


def _front(data: Any, limit: int) -> Any:
  return data.select(range(min(limit, len(data)))) if limit else data


def _read_json(stream: Any, place: epath.Path, limit: int) -> list[Row]:
  """One JSON object a line, blank lines skipped; or one JSON array of objects."""
  rows = []
  for line in stream:
    if not line.strip():
      continue
    if not rows and line.lstrip().startswith(b'['):
      rows = _parse(line + stream.read(), str(place))[: limit or None]
      break
    rows.append(_parse(line, f'{place}, row {len(rows) + 1}'))
    if len(rows) == limit:
      break
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise UserError(f'{place}, row {number}: must be a JSON object, not {excerpt(row)}.')
  return rows


def _parse(text: bytes, where: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    found = excerpt(text.decode('utf-8', 'replace'))
    raise UserError(f'{where}: not JSON: {error}; found {found}.') from error
