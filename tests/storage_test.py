"""Atomic writes of files and directories, and JSON lines that survive a torn line."""

import json
import os
import socket
import subprocess

import pytest

from segjax import storage
from segjax.errors import UserError


def _tree(directory):
  return {
    str(file.relative_to(directory)): file.read_text()
    for file in sorted(directory.rglob('*'))
    if file.is_file()
  }


def _write(directory, text):
  with storage.atomic_directory(directory) as partial:
    (partial / 'sub').mkdir()
    (partial / 'sub' / 'file').write_text(text)
    assert partial.parent == directory.parent and partial.name.startswith('.')


def test_creates_and_replaces(tmp_path):
  out = tmp_path / 'deep' / 'out'
  _write(out, 'old')
  _write(out, 'new')
  assert _tree(tmp_path) == {'deep/out/sub/file': 'new'}


def test_an_error_leaves_what_was_there(tmp_path):
  _write(tmp_path / 'out', 'old')

  def fail():
    with storage.atomic_directory(tmp_path / 'out') as partial:
      (partial / 'file').write_text('new')
      raise RuntimeError('no')

  with pytest.raises(RuntimeError):
    fail()
  assert _tree(tmp_path) == {'out/sub/file': 'old'}


def test_a_failed_rename_puts_the_old_back(tmp_path, monkeypatch):
  out = tmp_path / 'out'
  _write(out, 'old')
  rename = storage.Path.rename

  def refuse(path, target):
    if path.name.startswith('.') and not path.name.endswith('.old'):
      raise OSError('no')
    return rename(path, target)

  monkeypatch.setattr(storage.Path, 'rename', refuse)
  with pytest.raises(UserError, match=r'cannot be written \(no\)'):
    _write(out, 'new')
  monkeypatch.undo()
  assert _tree(tmp_path) == {'out/sub/file': 'old'}


def test_removes_directories_of_killed_processes(tmp_path):
  ended = subprocess.Popen(['true'])
  ended.wait()
  stem = f'.out.partial-{socket.gethostname()}-'
  others = [
    f'{stem}{os.getppid()}',  # still running
    f'{stem}{ended.pid}.old',  # an earlier checkpoint
    f'.out.partial-elsewhere-{ended.pid}',
    f'.other.partial-{socket.gethostname()}-{ended.pid}',
  ]
  for name in (f'{stem}{ended.pid}', *others):
    (tmp_path / name).mkdir()
  _write(tmp_path / 'out', 'old')
  assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, 'out'])


def test_check_target(tmp_path):
  own = ('config.json',)
  storage.check_target(tmp_path / 'new', own, overwrite=False)
  storage.check_target(tmp_path, own, overwrite=False)
  (tmp_path / 'model-00001-of-00002.safetensors').write_text('')
  (tmp_path / 'config.json').write_text('')
  storage.check_target(tmp_path, own, overwrite=True)
  with pytest.raises(ValueError, match='not empty; name a new directory, or use --overwrite'):
    storage.check_target(tmp_path, own, overwrite=False)
  with pytest.raises(ValueError, match='is also the source'):
    storage.check_target(tmp_path, own, overwrite=True, source=tmp_path / '.')
  with pytest.raises(ValueError, match='is a file'):
    storage.check_target(tmp_path / 'config.json', own, overwrite=True)
  (tmp_path / 'notes').write_text('')
  with pytest.raises(ValueError, match='holds notes, so it is more than a checkpoint'):
    storage.check_target(tmp_path, own, overwrite=True)


def test_check_space(tmp_path):
  storage.check_space(tmp_path / 'a' / 'b', 1)
  with pytest.raises(ValueError, match=r'needs 1000000000\.00 GB, and [\d.]+ GB are free'):
    storage.check_space(tmp_path / 'a' / 'b', 10**18)


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
  path = tmp_path / 'file'
  storage.write_text_atomically(path, 'one')
  with pytest.raises(KeyboardInterrupt), storage.atomic_file(path) as partial:
    partial.write_text('tw')
    raise KeyboardInterrupt
  assert _tree(tmp_path) == {'file': 'one'}
  storage.write_text_atomically(path, 'naïve')
  assert path.read_text(encoding='utf-8') == 'naïve' and _tree(tmp_path).keys() == {'file'}


def _torn_json_lines(path):
  """Steps 0 and 5, a line torn within a character, and step 10 without its line break."""
  lines = (
    b'{"step": 0, "x": "\xc3\xa9"}',
    b'{"step": 5}',
    b'{"step": 1, "x": "\xc3',
    b'{"step": 10}',
  )
  path.write_bytes(b'\n'.join(lines))
  return path


def test_torn_json_lines_are_skipped(tmp_path):
  path = _torn_json_lines(tmp_path / 'lines')
  assert [value['step'] for value in storage.read_json_lines(path)] == [0, 5, 10]
  content = path.read_bytes()
  for line in storage.scan_json_lines(path):
    assert json.loads(content[line.offset :][: line.size]) == line.value
  assert list(storage.read_json_lines(tmp_path / 'missing')) == []


def test_truncation_keeps_the_steps_before(tmp_path):
  path = _torn_json_lines(tmp_path / 'lines')
  storage.truncate_json_lines(path, 11)
  assert path.read_bytes() == b'{"step": 0, "x": "\xc3\xa9"}\n{"step": 5}\n{"step": 10}\n'
  storage.truncate_json_lines(path, 5)
  assert [value['step'] for value in storage.read_json_lines(path)] == [0]
  storage.truncate_json_lines(tmp_path / 'missing', 5)
  assert _tree(tmp_path).keys() == {'lines'}


def test_lines_that_a_person_has_spoilt_are_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  spoilt = ['3', '[]', '[' * 100_000, '{"loss": 1}', '{"step": "1"}', '{"step": true}']
  path.write_text('\n'.join(['{"step": 0}', *spoilt, '{"step": 1}']) + '\n')
  assert [v.get('step') for v in storage.read_json_lines(path)] == [0, None, '1', True, 1]
  storage.truncate_json_lines(path, 2)
  assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
