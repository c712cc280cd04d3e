"""JSON files in every wrong form are one line, without filling the memory."""

import os

import pytest

from segjax import json_files
from segjax.errors import UserError

WRONG = {
  'nested': (b'[' * 100_000 + b']' * 100_000, 'nested too deep'),
  'nested objects': (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'nested too deep'),
  'never closed': (b'[' * 100_000, 'nested too deep'),
  'cut': (b'{"a": 1', 'not valid JSON'),
  'empty': (b'', 'not valid JSON'),
  'twice': (b'{"a": 1, "b": {"x": 1, "x": 2}}', "'x' occurs twice"),
  'other encoding': ('{"a": "é"}'.encode('latin-1'), 'not valid JSON'),
  'many digits': (b'{"a": ' + b'1' * 5000 + b'}', 'not valid JSON'),
  'list': (b'[1]', 'holds a JSON list, not an object'),
  'null': (b'null', 'holds a JSON NoneType, not an object'),
  'many values': (b'{"a": [' + b'[],' * 5_000_000 + b'1]}', 'larger than 64 MB or 4,000,000'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_wrong_content_is_one_line(kind, tmp_path):
  content, part = WRONG[kind]
  file = tmp_path / 'config.json'
  file.write_bytes(content)
  with pytest.raises(UserError) as error:
    json_files.read_object(file, fix='fetch it again')
  message = str(error.value)
  assert message.startswith(str(file))
  assert part in message
  assert message.endswith('; fetch it again.')
  assert '\n' not in message
  assert len(message) < 300 + len(str(file))


def test_one_of_many_names_twice_is_found_in_one_pass():
  """The names were counted once per name: 900 million comparisons."""

  class Name(str):
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
      Name.compared += 1
      return str.__eq__(self, other)

  names = [Name(f'name{i}') for i in range(3000)]
  with pytest.raises(UserError, match="'name2999' occurs twice"):
    json_files._without_repeats([(name, 0) for name in [*names, Name(names[-1])]])
  assert Name.compared < len(names)


def test_not_a_file(tmp_path):
  """Opening a pipe would wait for a writer, and a device never ends."""
  with pytest.raises(UserError, match=r'x\.json does not exist; make one\.'):
    json_files.read_object(tmp_path / 'x.json', fix='make one')
  with pytest.raises(UserError, match='is not a file'):
    json_files.read_object(tmp_path)
  os.mkfifo(tmp_path / 'pipe.json')
  (tmp_path / 'device.json').symlink_to('/dev/zero')
  for name in ('pipe.json', 'device.json'):
    with pytest.raises(UserError, match='is not a file'):
      json_files.read_object(tmp_path / name)


def test_byte_order_mark_is_skipped(tmp_path):
  """Editors on Windows write one."""
  file = tmp_path / 'segment_reward.json'
  file.write_bytes(b'\xef\xbb\xbf{"version": 3}')
  assert json_files.read_object(file) == {'version': 3}
