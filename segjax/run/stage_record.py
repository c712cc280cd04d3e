"""Records a stage in stage.json, so that a later run can reuse its results or resume it.

`stage.json` holds the stage's key: the settings that it reads and content hashes of its inputs,
which together determine its results. A finished stage adds its results and content hashes of its
outputs. The directory of another key is never used: it is moved to `<stage>.old`, and back when a
run has its key again.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segjax.hf.model_card import DOC_FILES
from segjax.storage import make_directory, write_text_atomically

FILE = 'stage.json'

# Sections of a key, by the words that precede their entries in messages.
_SECTIONS = {
  'inputs': 'content of ',
  'functions': 'source of ',
  'versions': 'version of ',
}

Key = dict[str, Any]


def load_results_if_valid(
  directory: Path, key: Key, outputs: dict[str, str]
) -> dict[str, Any] | None:
  """Returns the results if the stage is finished, has this key and its outputs are unchanged."""
  record = _read(directory)
  # Outputs too: a model that was edited since does not count as the result of this key.
  is_valid = _is_finished(record) and record['outputs'] == outputs
  return record['results'] if is_valid and record['key'] == _json_roundtrip(key) else None


def _is_finished(record: dict[str, Any]) -> bool:
  """Returns whether a record has results that were not edited since."""
  return 'results' in record and record.get('sha256') == _digest(record)


def _digest(record: dict[str, Any]) -> str:
  """Returns the SHA-256 of a record's key, results and outputs."""
  parts = [record.get(name) for name in ('key', 'results', 'outputs')]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def restore_old(directory: Path, key: Key) -> bool:
  """Swaps `<stage>.old` with the stage's directory if only the former has this key.

  Returns:
    Whether they were swapped.
  """
  old, spare = (directory.with_name(directory.name + end) for end in ('.old', '.spare'))
  _finish_swap(directory, old, spare)
  key = _json_roundtrip(key)
  if _read(old).get('key') != key or _read(directory).get('key') == key:
    return False
  # Renames only: a run killed between two of them is put right at the next start.
  if directory.exists():
    directory.rename(spare)
  old.rename(directory)
  if spare.exists():
    spare.rename(old)
  return True


def _finish_swap(directory: Path, old: Path, spare: Path) -> None:
  """Undoes or completes the swap of a run that was killed between two renames."""
  if not spare.exists():
    return
  if not directory.exists():
    spare.rename(directory)
  elif not old.exists():
    spare.rename(old)
  else:
    shutil.rmtree(spare)  # newer directories have both names


def prepare_directory(directory: Path, key: Key) -> str:
  """Creates the directory for a stage with this key.

  An unfinished stage with the same key is kept so that it can be resumed; anything else is moved to
  `<stage>.old`, which is replaced.

  Returns:
    Why the directory was moved, '' if it was not.
  """
  record, reason = _read(directory), ''
  if directory.exists() and (record.get('key') != _json_roundtrip(key) or 'results' in record):
    if {path.name for path in directory.iterdir()} <= {FILE}:
      shutil.rmtree(directory)  # holds stage.json alone; `.old` may hold a model
    else:
      reason = _difference(record, _json_roundtrip(key))
      old = directory.with_name(directory.name + '.old')
      shutil.rmtree(old, ignore_errors=True)
      directory.rename(old)
  make_directory(directory)
  # Before any output: files in a directory without a key are never resumed.
  _write(directory, {'key': key})
  return reason


def record_results(
  directory: Path, key: Key, results: dict[str, Any], outputs: dict[str, str]
) -> dict[str, Any]:
  """Records that the stage is finished; returns the results as a later run reads them."""
  record = _json_roundtrip({'key': key, 'results': results, 'outputs': outputs})
  _write(directory, record | {'sha256': _digest(record)})
  return record['results']


def content_hash(path: Path, skip: Sequence[str] = ()) -> str:
  """Returns the SHA-256 of the names and bytes of a file, or of a directory's files.

  Skips files named in `skip`, partial files that a killed process left, and documents on a model: a
  model card holds times and paths, may be edited, and changes no result.
  """
  digest = hashlib.sha256()
  # Sorted: each file system lists in an order of its own.
  files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
  for file in files:
    is_read = not path.is_dir() or file.name not in (*skip, *DOC_FILES)
    if not is_read or file.suffix == '.partial':
      continue
    # The size separates the files: bytes moved from one to the next change the hash.
    digest.update(f'{file.relative_to(path)}\0{file.stat().st_size}\0'.encode())
    with file.open('rb') as stream:
      while block := stream.read(1 << 20):  # weights may not fit in memory
        digest.update(block)
  return digest.hexdigest()


def _difference(record: dict[str, Any], key: Key) -> str:
  """Returns what differs between a record and a key, as text."""
  if not record.get('key'):
    return f'it was left without a {FILE}'
  names = changed_keys(record['key'], key)
  if not names:
    return 'its output was changed' if _is_finished(record) else f'its {FILE} was changed'
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f'{", ".join(names[:3])}{more} changed'


def stored_key(directory: Path) -> Key:
  """Returns the key of the stage in the directory; {} if there is none."""
  return _read(directory).get('key', {})


def changed_keys(before: Key, now: Key) -> list[str]:
  """Returns the settings, inputs, functions and versions in which two keys differ, as text."""
  before, now = _flat(before), _flat(now)
  changed = [name for name in before | now if before.get(name) != now.get(name)]
  labels = []
  for name in changed:
    section, _, rest = name.partition('.')
    label = f'{_SECTIONS.get(section, "")}{rest or name}'
    if section == 'versions' and before.get(name) and now.get(name) and len(now[name]) < 20:
      label += f' ({before[name]}, now {now[name]})'
    labels.append(label)
  return labels


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  leaves = {}
  for name, value in tree.items():
    is_tree = isinstance(value, dict)
    leaves |= _flat(value, f'{prefix}{name}.') if is_tree else {prefix + name: value}
  return leaves


def _json_roundtrip(value: Any) -> Any:
  """Returns the value as JSON reads it back: tuples become lists."""
  return json.loads(json.dumps(value))


def _read(directory: Path) -> dict[str, Any]:
  """Returns the record of a stage; {} if it has none, or one that is damaged."""
  try:
    record = json.loads((directory / FILE).read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
    return {}
  key = record.get('key') if isinstance(record, dict) else None
  is_valid = isinstance(key, dict) and all(isinstance(part, dict) for part in key.values())
  return record if is_valid else {}


def _write(directory: Path, record: dict[str, Any]) -> None:
  write_text_atomically(directory / FILE, json.dumps(record, indent=2) + '\n')
