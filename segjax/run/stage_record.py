"""What a stage remembers of itself: whether a later run may reuse it, or go on from its middle.

`stage.json` in the stage's directory holds the key, which is all that decides its outcome: the
settings it reads and the content of its inputs. A finished stage adds its results and what its
output looked like. What another key has made is not used: it is moved to `<stage>.old`, and comes
back from there when its key does.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segjax.hf.model_card import DOC_FILES
from segjax.storage import write_text_atomically

FILE = 'stage.json'

Key = dict[str, Any]


def load_results_if_valid(
  directory: Path, key: Key, outputs: dict[str, str]
) -> dict[str, Any] | None:
  """The results of the stage if it is finished, by this key, and its output untouched."""
  record = _read(directory)
  if 'results' in record and record['key'] == _json_roundtrip(key) and record['outputs'] == outputs:
    return record['results']
  return None


def restore_old(directory: Path, key: Key) -> None:
  """Brings `<stage>.old` back, if this key made it and did not make what stands in its place."""
  old, spare = (directory.with_name(directory.name + end) for end in ('.old', '.spare'))
  made = _json_roundtrip(key)
  if _read(old).get('key') == made and _read(directory).get('key') != made:
    if directory.exists():
      directory.rename(spare)
    old.rename(directory)
    if spare.exists():
      spare.rename(old)


def prepare_directory(directory: Path, key: Key) -> str:
  """Makes the directory ready for a stage with this key.

  An unfinished stage of the same key stays as it is, to be gone on from; all else that lies there
  is moved to `<stage>.old`, in place of what was there before.

  Returns:
    Why something was moved, '' if nothing was.
  """
  record, reason = _read(directory), ''
  if directory.exists() and (record.get('key') != _json_roundtrip(key) or 'results' in record):
    if {path.name for path in directory.iterdir()} <= {FILE}:
      shutil.rmtree(directory)  # it came to nothing, and is not worth what it would replace
    else:
      reason = _difference(record, _json_roundtrip(key))
      old = directory.with_name(directory.name + '.old')
      shutil.rmtree(old, ignore_errors=True)
      directory.rename(old)
  directory.mkdir(parents=True, exist_ok=True)
  _write(directory, {'key': key})
  return reason


def record_results(
  directory: Path, key: Key, results: dict[str, Any], outputs: dict[str, str]
) -> dict[str, Any]:
  """Records that the stage is finished; returns the results as a later run will read them."""
  _write(directory, {'key': key, 'results': results, 'outputs': outputs})
  return _json_roundtrip(results)


def content_hash(path: Path, skip: Sequence[str] = ()) -> str:
  """SHA-256 over names and bytes of a file or a directory's files.

  Those named `skip` are left out, those that a killed process left half-written, and what only
  tells of a model: its card has times and places in it, or may be edited, and decides nothing.
  """
  digest = hashlib.sha256()
  files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
  for file in files:
    is_read = not path.is_dir() or file.name not in (*skip, *DOC_FILES)
    if not is_read or file.suffix == '.partial':
      continue
    digest.update(f'{file.relative_to(path)}\0{file.stat().st_size}\0'.encode())
    with file.open('rb') as stream:
      while block := stream.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


def _difference(record: dict[str, Any], key: Key) -> str:
  """What is not as it was, in words."""
  if not record.get('key'):
    return f'it was left without a {FILE}'
  names = changed_keys(record['key'], key)
  if not names:
    return 'its output was changed'
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f'{", ".join(names[:3])}{more} changed'


def stored_key(directory: Path) -> Key:
  """The key of the stage that was begun in the directory; {} if none was."""
  return _read(directory).get('key', {})


def changed_keys(before: Key, now: Key) -> list[str]:
  """The settings and inputs that two keys do not have in common, as a user names them."""
  before, now = _flat(before), _flat(now)
  changed = [name for name in before | now if before.get(name) != now.get(name)]
  return [name.removeprefix('settings.').replace('inputs.', 'content of ') for name in changed]


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  found = {}
  for name, value in tree.items():
    is_tree = isinstance(value, dict) and prefix != 'inputs.'
    found |= _flat(value, f'{prefix}{name}.') if is_tree else {prefix + name: value}
  return found


def _json_roundtrip(value: Any) -> Any:
  """As JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(value))


def _read(directory: Path) -> dict[str, Any]:
  try:
    return json.loads((directory / FILE).read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return {}


def _write(directory: Path, record: dict[str, Any]) -> None:
  write_text_atomically(directory / FILE, json.dumps(record, indent=2) + '\n')
