"""Files of several sources, splits and slices, and files that are broken or hostile."""

import gzip
import json
import os
import re
import time

import pytest
from etils import epath
from fixtures.tokenizers import user

from segjax.data import arrow_store, files, json_rows
from segjax.data.lazy_rows import open_rows
from segjax.data.rows import Reading
from segjax.data.source_list import Source, parse_sources
from segjax.data.sources import load_rows
from segjax.data.stored_rows import StoredRows

ROWS = [{'prompt': f'question {i}'} for i in range(10)]


def write(path, rows=ROWS):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  path.parent.mkdir(exist_ok=True, parents=True)
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())
  return str(path)


def numbers(rows):
  return [int(row['prompt'].split()[1]) for row in rows]


def write_kind(tmp_path, kind):
  import datasets

  path = tmp_path / {'parquet': 'rows.parquet', 'jsonl': 'rows.jsonl'}.get(kind, kind)
  data = datasets.Dataset.from_list(ROWS)
  if kind == 'jsonl':
    write(path)
  elif kind == 'parquet':
    data.to_parquet(str(path))
  elif kind == 'saved':
    data.save_to_disk(path)
  elif kind == 'saved_splits':
    datasets.DatasetDict({'train': data}).save_to_disk(path)
  elif kind == 'shards':
    for i in range(3):
      write(path / 'data' / f'train-0000{i}-of-00003.jsonl', ROWS[4 * i : 4 * i + 4])
  else:
    write(path / 'train.jsonl')
  return str(path)


KINDS = ('jsonl', 'parquet', 'saved', 'saved_splits', 'shards', 'files')


@pytest.mark.parametrize('kind', KINDS)
def test_slices_and_unknown_splits(tmp_path, kind):
  path = write_kind(tmp_path, kind)
  assert numbers(load_rows(path)) == list(range(10))
  for split, expected in (
    ('train[:90%]', range(9)),
    ('train[90%:]', [9]),
    ('train[3:5]', [3, 4]),
    ('train[-2:]', [8, 9]),
    ('train[5:7]+train[:1]', [5, 6, 0]),
  ):
    assert numbers(load_rows(path, split)) == list(expected), split
  rows = load_rows(path, 'train[3:9]', limit=2)
  assert numbers(rows) == [3, 4]
  number = '4' if kind != 'shards' else '1'  # of the file, where an editor shows it
  assert rows.location(1 if kind == 'shards' else 0).endswith(f', row {number}')
  for split, message in (
    ('nonsense', "no split 'nonsense'; it has "),
    ('test', "no split 'test'; it has "),
    ('test[:5]', "no split 'test'; it has "),
    ('train[20:30]', r'selects no row of the 10'),
    ('train[5:3]', 'selects no row'),
    ('train[:x]', 'cannot be read'),
    ('train[:3', 'cannot be read'),
  ):
    with pytest.raises(ValueError, match=message):
      load_rows(path, split)


def test_a_file_is_the_split_of_its_name(tmp_path):
  path = write(tmp_path / 'test.jsonl.gz')
  assert len(load_rows(path, 'test[:3]')) == 3
  path = write(tmp_path / 'test-00001-of-00002.jsonl')
  assert len(load_rows(path, 'test')) == len(load_rows(path)) == 10


def test_shards_whose_columns_differ(tmp_path):
  for i, more in enumerate(({}, {'source': 'x'})):
    write(tmp_path / 'data' / f'train-0000{i}-of-00002.jsonl', [row | more for row in ROWS])
  (tmp_path / 'name.py').write_text('import datasets')  # a loading script is not run
  rows = load_rows(str(tmp_path))
  assert numbers(rows) == [*range(10), *range(10)]
  assert rows[13]['source'] == 'x'
  assert rows.location(13) == 'train-00001-of-00002.jsonl, row 4'


def test_missing_and_ambiguous_files(tmp_path):
  write(tmp_path / 'a' / 'train-00000-of-00003.jsonl')
  write(tmp_path / 'a' / 'train-00002-of-00003.jsonl')
  with pytest.raises(ValueError, match='2 of 3 shards; download'):
    load_rows(str(tmp_path / 'a'))
  write(tmp_path / 'b' / 'train.jsonl')
  write(tmp_path / 'b' / 'train.json.gz')
  with pytest.raises(ValueError, match=r"split 'train': train\.json\.gz, train\.jsonl; remove"):
    load_rows(str(tmp_path / 'b'))


@pytest.mark.parametrize(
  'error',
  [RuntimeError('Dataset scripts are no longer supported'), TypeError('x\n\ny'), KeyError('z')],
)
def test_every_exception_of_datasets_is_one_line(tmp_path, monkeypatch, error):
  import datasets

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(datasets, 'load_dataset', fail)
  monkeypatch.setattr(datasets, 'load_from_disk', fail)
  (tmp_path / 'dataset_info.json').touch()
  for path in ('owner/name', str(tmp_path)):
    with pytest.raises(ValueError, match='datasets cannot load') as raised:
      load_rows(path)
    assert '\n' not in str(raised.value)


def test_sources_with_weights_and_patterns(tmp_path):
  a, b = write(tmp_path / 'a.jsonl', ROWS[:2]), write(tmp_path / 'b.jsonl', ROWS[4:8])
  assert numbers(load_rows(f'{a},{b}')) == [0, 1, 4, 5, 6, 7]
  rows = load_rows(f'{a}*2, {b}*0.5')
  assert numbers(rows) == [0, 0, 1, 1, 4, 6]
  assert numbers(rows[i] for i in range(len(rows))) == numbers(rows)
  assert rows.location(2) == 'a.jsonl, row 2'
  assert rows.location(5) == 'b.jsonl, row 3'
  with pytest.raises(IndexError):
    rows[6]
  assert numbers(load_rows(f'{tmp_path}/?.jsonl')) == [0, 1, 4, 5, 6, 7]
  assert numbers(load_rows(f'{tmp_path}/*.jsonl*1.5', limit=2)) == [0, 0, 1, 4, 4, 5]
  assert numbers(load_rows(f'{a},{b}', 'train[:1]')) == [0, 4]
  with pytest.raises(ValueError, match=r'none\*: no file matches'):
    load_rows(f'{tmp_path}/none*')
  with pytest.raises(ValueError, match='the weight is 0'):
    load_rows(f'{a}*0,{b}')


@pytest.mark.parametrize('text', [',', ' , *2'])
def test_lists_without_a_source(text):
  with pytest.raises(ValueError, match=r'names no source|no file matches'):
    parse_sources(text)


def test_patterns_that_etils_lacks(tmp_path):
  with pytest.raises(ValueError, match='the pattern cannot be expanded'):
    parse_sources(f'{tmp_path}/**/*.jsonl')


def test_a_weight_without_sense():
  with pytest.raises(ValueError, match=r'a.jsonl\*100000000000: the weight is over 1,000'):
    parse_sources('a.jsonl*100000000000')


def test_pipes_and_devices_are_not_read(tmp_path):
  os.mkfifo(tmp_path / 'a.jsonl')  # reading would wait for a writer
  (tmp_path / 'b.jsonl').symlink_to('/dev/zero')
  (tmp_path / 'data').mkdir()
  os.mkfifo(tmp_path / 'data' / 'train.jsonl')
  for name in ('a.jsonl', 'b.jsonl', 'data'):
    with pytest.raises(ValueError, match='a pipe or device, which cannot be read twice'):
      load_rows(str(tmp_path / name))


def test_a_directory_is_known_by_its_files(tmp_path):
  folder = tmp_path / 'folder'
  write(folder / 'train.jsonl')
  write(folder / 'more' / 'test.jsonl')
  (folder / 'more' / 'loop').symlink_to(folder)
  assert len(open_rows(str(folder), 'train', 0, Reading())) == len(ROWS)
  before = files.stamps(epath.Path(folder))
  assert [os.path.basename(stamp.path) for stamp in before] == ['test.jsonl', 'train.jsonl']
  assert files.stamps(epath.Path(folder)) == before
  write(folder / 'more' / 'test.jsonl', ROWS[1:])
  assert files.stamps(epath.Path(folder)) != before


def test_source_lists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert parse_sources('') == []
  assert parse_sources('owner/name*3, x/y') == [Source('owner/name', 3.0), Source('x/y')]
  write(tmp_path / 'a,b*2')
  assert parse_sources('a,b*2') == [Source('a,b*2')]  # the name of a file


ONE = json.dumps(ROWS[0])


@pytest.mark.parametrize('text', [ONE, f'[{ONE}]', f'\n[\n{ONE}\n]\n', f'{ONE}\n\n'])
def test_byte_order_mark(tmp_path, text):
  for mark in ('', '\ufeff'):
    (tmp_path / 'a.json').write_text(mark + text, encoding='utf-8')
    assert list(load_rows(str(tmp_path / 'a.json'))) == ROWS[:1]
  (tmp_path / 'a.json').write_text(text, encoding='utf-16')
  with pytest.raises(ValueError, match=r'a\.json: the text is UTF-16; save it as UTF-8'):
    load_rows(str(tmp_path / 'a.json'))


@pytest.mark.parametrize('chunk', [1, 7, 1 << 20])
def test_arrays_are_read_in_chunks(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_rows, '_CHUNK', chunk)
  rows = [{'prompt': 'ä€😀 ] , [ "' * 9, 'x': [1, {'y': 2.5}]}, *ROWS]
  path = tmp_path / 'a.json'
  path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding='utf-8')
  assert list(load_rows(str(path))) == rows
  assert list(load_rows(str(path), limit=2)) == rows[:2]


@pytest.mark.parametrize(
  'text, message',
  [
    ('[{"a": 1} {"a": 2}]', r'row 1: not JSON: expected a comma or \]'),
    ('[{"a": 1}, {"a": ]', 'row 2: not JSON: Expecting value at'),
    ('[{"a": 1}, ', 'row 2: not JSON: Expecting value'),
    ('[{"a": 1}', 'row 1: not JSON: the array is not closed'),
    ('[{"a": 1}]\n[{"a": 2}]', 'text follows the array of 1 rows'),
    ('[{"a": 1}, 5]', 'row 2: must be a JSON object, not 5'),
    ('{\n  "a": 1\n}\n', 'an object is spread over several lines'),
    ('{"data": [{"prompt": "a"}, {"prompt": "b"}]}', "one object in place of a list.*'data'"),
    ('{"prompt": ["a", "b"], "chosen": ["c", "d"]}', r'one object of columns \(prompt, chosen\)'),
    ('{"a": 1}\n{"a": \n', 'row 2: not JSON'),
    ('[' * 100_000, 'row 1: .*nested too deeply'),
    ('{"a":' * 100_000, 'row 1: .*nested too deeply'),
    ('{"a": 1}\n' + '{"a":' * 100_000, 'row 2: .*nested too deeply'),
    ('{"a": ' + '9' * 5000 + '}', 'row 1: not JSON'),
  ],
)
def test_broken_json(tmp_path, text, message):
  (tmp_path / 'a.json').write_text(text)
  start = time.process_time()
  with pytest.raises(ValueError, match=r'a\.json(, |: )' + message) as raised:
    load_rows(str(tmp_path / 'a.json'))
  assert time.process_time() - start < 2
  assert '\n' not in str(raised.value) and len(str(raised.value)) < 500


def test_bytes_that_are_no_text(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, row 2: not JSON.*utf-8'):
    load_rows(str(path))
  path.write_bytes(b'[{"prompt": "a"},\n{"prompt": "\xff"}]\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, row 2 or later: not UTF-8'):
    load_rows(str(path))


def test_bad_lines_are_dropped(tmp_path):
  (tmp_path / 'a.jsonl').write_text(f'{ONE}\n{{"a": \n[1]\n{ONE}\n')
  lines, counts = [], {}
  rows = load_rows(str(tmp_path / 'a.jsonl'), reading=Reading(drop_bad=True, log=lines.append))
  read = list(rows.read(lambda row, location: row['prompt'], counts))
  assert [(index, location) for index, location, _ in read] == [
    (0, 'a.jsonl, row 1'),
    (3, 'a.jsonl, row 4'),
  ]
  assert counts == {'dropped_bad': 2}
  assert len(lines) == 1 and 'row 2: not JSON' in lines[0]


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'tail'])
@pytest.mark.parametrize('kind', ['a.jsonl.gz', 'a.json.gz', 'a.parquet', 'saved'])
def test_damaged_files(tmp_path, kind, damage):
  import datasets

  path = tmp_path / kind
  rows = [{'messages': [user(f'question {i} {hash(str(i))}')]} for i in range(2000)]
  if kind == 'saved':
    datasets.Dataset.from_list(rows).save_to_disk(path)
    file = next(path.glob('*.arrow'))
  elif kind == 'a.parquet':
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    file = path
  else:
    text = json.dumps(rows) if kind == 'a.json.gz' else '\n'.join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()))
    file = path
  data = bytearray(file.read_bytes())
  if damage == 'cut':
    del data[len(data) // 2 :]
  elif damage == 'tail':
    del data[-20:]
  else:
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(255 - byte for byte in data[middle : middle + 200])
  file.write_bytes(bytes(data))
  with pytest.raises(ValueError, match=re.escape(kind)) as raised:
    list(load_rows(str(path)).read(lambda row, _: row['messages'][0]['content'].encode(), {}))
  assert '\n' not in str(raised.value)


def test_saved_dataset_without_its_files(tmp_path):
  (tmp_path / 'dataset_info.json').write_text('{}')
  with pytest.raises(ValueError, match='datasets cannot load this directory'):
    load_rows(str(tmp_path))
  (tmp_path / 'state.json').write_text('{"_data_files": 5}')
  with pytest.raises(ValueError, match='datasets cannot load this directory'):
    load_rows(str(tmp_path))


def _pack(path, piece, times, end=b''):
  with gzip.open(path, 'wb', compresslevel=9) as file:
    for _ in range(times):
      file.write(piece)
    file.write(end)
  return str(path)


MIB = 1 << 20
LINE = (json.dumps(ROWS[0]) + '\n').encode() * (MIB // 26)
FEW_ROWS = LINE[: LINE.index(b'\n') + 1] * 5000  # each row takes calls that tests check


@pytest.mark.campaign
@pytest.mark.parametrize(
  'piece, times, message',
  [
    (b' ' * MIB, 40, 'bytes unpack to more than'),
    (b'\n' * MIB, 4, 'bytes of blank lines'),
    (b'{"prompt": "' + b'a' * MIB, 40, 'bytes unpack to more than'),
    (b'[{"prompt": "' + b'a' * MIB, 40, 'bytes unpack to more than'),
    (FEW_ROWS, 12, 'bytes unpack to more than'),
  ],
  ids=['spaces', 'blank_lines', 'long_row', 'long_row_of_an_array', 'rows'],
)
def test_files_that_unpack_to_gigabytes(tmp_path, monkeypatch, piece, times, message):
  path = _pack(tmp_path / 'bomb.jsonl.gz', piece, times)
  if piece == FEW_ROWS:
    monkeypatch.setattr(json_rows, '_UNCHECKED_BYTES', MIB // 8)  # for a quick test
  start = time.process_time()
  with pytest.raises(ValueError, match=r'bomb\.jsonl\.gz(, |: ).*' + message):
    load_rows(path)
  assert time.process_time() - start < 10  # all of it would take minutes


def test_max_rows_bounds_what_is_read(tmp_path):
  path = _pack(tmp_path / 'bomb.jsonl.gz', LINE, 100)
  start = time.process_time()
  assert len(load_rows(path, limit=100)) == 100
  path = _pack(tmp_path / 'bomb.json.gz', b'[' + ONE.encode(), 1, (b',' + ONE.encode()) * 5_000_000)
  start = time.process_time()
  assert len(load_rows(path, limit=100)) == 100
  assert time.process_time() - start < 2


def test_parquet_that_unpacks_to_gigabytes(tmp_path):
  import pyarrow as pa
  import pyarrow.parquet

  path = tmp_path / 'bomb.parquet'
  word = pa.array(['a' * 10_000])
  column = pa.DictionaryArray.from_arrays(pa.array([0] * 400_000, pa.int32()), word)
  pa.parquet.write_table(pa.table({'prompt': column}), path, store_schema=False)
  with pytest.raises(ValueError, match=r'bomb\.parquet: .*unpack to more than'):
    load_rows(str(path))
  assert len(load_rows(str(path), limit=5)) == 5


def test_a_row_has_a_size_limit(tmp_path):
  path = tmp_path / 'a.jsonl'
  for text in ('{"prompt": "a"}\n{"prompt": "', '[{"prompt": "a"},\n{"prompt": "'):
    path.write_text(text + 'a' * (33 * MIB))
    with pytest.raises(ValueError, match=r'a\.jsonl, row 2: longer than 32 MiB, the limit'):
      load_rows(str(path))
    assert len(load_rows(str(path), limit=1)) == 1


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.json', 'a.parquet'])
def test_large_files_are_read_row_by_row(tmp_path, monkeypatch, name):
  """They give the rows of small ones, whole and in parts."""
  import datasets

  path, rows = tmp_path / name, [{'prompt': f'question {i} é'} for i in range(50)]
  if name == 'a.parquet':
    datasets.Dataset.from_list(rows).to_parquet(str(path), batch_size=7)
  elif name == 'a.json':
    path.write_text('\ufeff' + json.dumps(rows), encoding='utf-8')
  else:
    text = '\ufeff' + '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n'
    path.write_bytes(gzip.compress(text.encode()) if name.endswith('gz') else text.encode())
  monkeypatch.setattr(json_rows, '_IN_MEMORY', 300)
  monkeypatch.setattr(arrow_store, '_IN_MEMORY', 300)
  monkeypatch.setattr(files, '_BATCH', 7)
  loaded = load_rows(str(path))
  assert name == 'a.parquet' or isinstance(loaded.rows, StoredRows)
  assert list(loaded) == [loaded[i] for i in range(50)] == rows
  assert list(load_rows(str(path), 'train[10:30]')) == rows[10:30]
  assert list(load_rows(str(path), limit=20)) == rows[:20]
  assert list(load_rows(f'{path}*0.5')) == rows[::2]
  with pytest.raises(IndexError):
    loaded[50]


def test_bad_lines_of_large_files_are_dropped(tmp_path, monkeypatch):
  monkeypatch.setattr(json_rows, '_IN_MEMORY', 20)
  for name in ('a.jsonl', 'a.jsonl.gz'):
    path = tmp_path / name
    text = f'{ONE}\n{{"a": \n[1]\n{ONE}\n{{"a": }}\n{ONE}'
    path.write_bytes(gzip.compress(text.encode()) if name.endswith('gz') else text.encode())
    rows, counts = load_rows(str(path), reading=Reading(drop_bad=True)), {}
    assert isinstance(rows.rows, StoredRows)
    assert [index for index, _, _ in rows.read(lambda row, location: row, counts)] == [0, 3, 5]
    assert counts == {'dropped_bad': 3}


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_bad_lines_of_large_files_are_errors(tmp_path, monkeypatch, name):
  """A line that looks like an object is parsed where it is used; the error is the same."""
  path = tmp_path / name
  bad = (f'{{"a": \xff{"b" * 90}}}', '{"a": 1} {}', f'{{"a": {"[" * 9999}}}')
  for line in (*bad, '{"a": ', '[1]'):
    data = f'{ONE}\n\n{ONE}\n{line}\n\n{ONE}\n'.encode('latin-1')
    path.write_bytes(gzip.compress(data) if name.endswith('gz') else data)
    with pytest.raises(ValueError) as small:
      load_rows(str(path))
    with monkeypatch.context() as patch:
      patch.setattr(json_rows, '_IN_MEMORY', 20)
      for read in (list, lambda rows: rows[2], lambda rows: list(rows.part(2, 4))):
        with pytest.raises(ValueError) as large:
          read(load_rows(str(path)))
        assert str(large.value) == str(small.value)
        assert str(small.value).startswith(f'{path}, row 3: ')
      if line in bad:
        assert len(load_rows(str(path))) == 4
