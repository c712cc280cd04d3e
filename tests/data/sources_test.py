import gzip
import json

import pytest
from fixtures.tokenizers import assistant, user

from segjax.data.sources import (
  Pair,
  Rows,
  as_conversation,
  as_pair,
  as_prompt,
  is_hub_id,
  load_rows,
)

ROWS = [{'messages': [user(f'question {i}')], 'chosen': f'good {i}'} for i in range(5)]


def _jsonl(rows):
  return '\n'.join(json.dumps(row) for row in rows) + '\n'


def _write(tmp_path, name):
  file = tmp_path / name
  if name.endswith('.parquet'):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(file))
  elif name.endswith('.gz'):
    file.write_bytes(gzip.compress(_jsonl(ROWS).encode()))
  else:
    is_array = name == 'array.json'
    file.write_text(json.dumps(ROWS, indent=1) if is_array else _jsonl(ROWS))
  return str(file)


NAMES = ['a.jsonl', 'a.jsonl.gz', 'lines.json', 'array.json', 'a.json.gz', 'a.parquet']


@pytest.mark.parametrize('limit', [0, 2, 9])
@pytest.mark.parametrize('name', NAMES)
def test_files(tmp_path, name, limit):
  rows = load_rows(_write(tmp_path, name), limit=limit)
  assert list(rows) == ROWS[: limit or None]
  assert rows[1] == ROWS[1]
  assert rows.location(1) == f'{name}, row 2'


def test_saved_dataset(tmp_path):
  import datasets

  data = datasets.Dataset.from_list(ROWS)
  data.save_to_disk(tmp_path / 'one')
  datasets.DatasetDict({'train': data, 'extra': data}).save_to_disk(tmp_path / 'many')
  assert list(load_rows(str(tmp_path / 'one'), limit=2)) == ROWS[:2]
  assert list(load_rows(str(tmp_path / 'many'), 'extra')) == ROWS
  with pytest.raises(ValueError, match=r"no split 'test'; it has extra, train"):
    load_rows(str(tmp_path / 'many'), 'test')


def test_directory_of_splits(tmp_path):
  _write(tmp_path, 'train.jsonl')
  _write(tmp_path, 'test.jsonl.gz')
  _write(tmp_path, 'dev.parquet')
  for split in ('train', 'test', 'dev'):
    assert list(load_rows(str(tmp_path), split)) == ROWS
  with pytest.raises(ValueError, match=r"no split 'valid'; it has dev, test, train"):
    load_rows(str(tmp_path), 'valid')


def test_sharded_directory(tmp_path, monkeypatch):
  import datasets

  # Otherwise `datasets` would use the user's cache.
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'hub' / 'data').mkdir(parents=True)
  for shard in range(2):
    part = datasets.Dataset.from_list(ROWS[2 * shard : 2 * shard + 2])
    part.to_parquet(str(tmp_path / 'hub' / 'data' / f'train-0000{shard}-of-00002.parquet'))
  assert list(load_rows(str(tmp_path / 'hub'))) == ROWS[:4]
  with pytest.raises(ValueError, match='test'):
    load_rows(str(tmp_path / 'hub'), 'test')


@pytest.mark.parametrize(
  'content, message',
  [
    ('{"a": 1}\n{"a": \n', r'rows\.jsonl, row 2: not JSON'),
    ('{"a": 1}\n\n[1]\n', r'rows\.jsonl, row 2: must be a JSON object'),
    ('\n', r'rows\.jsonl: no rows'),
    ('[]', r'rows\.jsonl: no rows'),
    ('[1, {}]', r'rows\.jsonl, row 1: must be a JSON object, not 1'),
  ],
  ids=['broken_line', 'not_an_object', 'blank', 'empty_array', 'array_of_numbers'],
)
def test_invalid_json(tmp_path, content, message):
  (tmp_path / 'rows.jsonl').write_text(content)
  with pytest.raises(ValueError, match=message):
    load_rows(str(tmp_path / 'rows.jsonl'))


@pytest.mark.parametrize(
  'name, message',
  [
    ('a.jsonl.gz', 'invalid gzip'),
    ('a.parquet', 'not a parquet file'),
    ('a.csv', 'unknown kind of file'),
  ],
)
def test_invalid_files(tmp_path, name, message):
  (tmp_path / name).write_text('nothing of the kind')
  with pytest.raises(ValueError, match=message):
    load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
  'path',
  ['/no/such/place', './rows.jsonl', 'no/such.jsonl', 'nowhere', 'a/b/c', 'here/missing'],
)
def test_missing_path_needs_no_network(tmp_path, monkeypatch, path):
  import datasets

  def refuse(*args, **kwargs):
    raise AssertionError('went to the network')

  monkeypatch.setattr(datasets, 'load_dataset', refuse)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'here').mkdir()
  with pytest.raises(ValueError, match='no such file or directory'):
    load_rows(path)


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('a/b', True),
    ('meta-llama/Llama-3.1-8B', True),
    ('a/b.json', False),  # a data file
    ('a/b/c', False),
    ('b', False),
    ('a/b/', False),
    ('./a', False),
    ('../a', False),
    ('.hidden/a', False),
    ('~/a', False),
    ('gs://x', False),
    ('here/b', False),  # a misspelled file of a directory that exists
  ],
)
def test_is_hub_id(path, expected, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'here').mkdir()
  assert is_hub_id(path) is expected


def test_hub_id(monkeypatch):
  import datasets

  def load(path, split):
    if split != 'train':
      raise ValueError(f'Unknown split "{split}". Should be one of [\'train\'].')
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, 'load_dataset', load)
  rows = load_rows('owner/name', limit=3)
  assert list(rows) == ROWS[:3]
  assert rows.location(0) == 'owner/name, row 1'
  with pytest.raises(ValueError, match=r"owner/name: datasets cannot load split 'x'.*train"):
    load_rows('owner/name', 'x')


def test_empty_directory(tmp_path):
  with pytest.raises(ValueError, match=r"no split 'train'; it has no \.jsonl"):
    load_rows(str(tmp_path))


HELLO = [user('hello')]
PAIR = Pair(HELLO, 'good', 'bad')
FORMS = {
  'lists': {
    'chosen': [*HELLO, assistant('good')],
    'rejected': [*HELLO, assistant('bad')],
  },
  'messages': {'messages': HELLO, 'chosen': 'good', 'rejected': 'bad'},
  'prompt_string': {'prompt': 'hello', 'chosen': 'good', 'rejected': 'bad'},
  'prompt_messages': {'prompt': HELLO, 'chosen': 'good', 'rejected': 'bad'},
  'lone_answers': {
    'prompt': HELLO,
    'chosen': [assistant('good')],
    'rejected': [assistant('bad')],
  },
  'null_columns': {
    'prompt': 'hello',
    'messages': None,
    'chosen': 'good',
    'rejected': 'bad',
  },
}


@pytest.mark.parametrize('form', FORMS)
def test_pair_forms(form):
  row = FORMS[form]
  assert as_pair(row) == PAIR
  assert as_conversation(row) == [*HELLO, assistant('good')]
  assert as_prompt(row) == HELLO


def test_other_keys_of_a_message_are_left_out():
  messages = [dict(user('hello'), name=None), dict(assistant('good'), weight=1)]
  assert as_conversation({'messages': messages}) == [*HELLO, assistant('good')]


def test_conversation_as_it_is():
  messages = [*HELLO, assistant('a'), user('b'), assistant('c')]
  assert as_conversation({'messages': messages}) == messages
  assert as_prompt({'messages': messages}) == messages[:-1]
  assert as_prompt({'messages': messages[:-1]}) == messages[:-1]


@pytest.mark.parametrize(
  'ratings, gap',
  [
    ({}, None),
    ({'chosen_rating': None, 'rejected_rating': None}, None),
    ({'chosen_rating': 5, 'rejected_rating': 3.5}, 1.5),
    ({'chosen-rating': 2.0, 'rejected-rating': 4}, -2.0),
    ({'chosen_score': 0, 'rejected_score': 0}, 0.0),
    ({'chosen_score': 9, 'rejected_score': 1, 'chosen-rating': 2, 'rejected-rating': 1}, 1.0),
    ({'chosen-rating': 2, 'rejected-rating': 1, 'chosen_rating': 7, 'rejected_rating': 1}, 6.0),
    (
      {'chosen_rating': None, 'rejected_rating': None, 'chosen_score': 3, 'rejected_score': 1},
      2.0,
    ),
  ],
)
def test_ratings(ratings, gap):
  pair = as_pair(FORMS['messages'] | ratings)
  assert pair == Pair(HELLO, 'good', 'bad', gap)


@pytest.mark.parametrize(
  'ratings, message',
  [
    (
      {'chosen_rating': 1},
      '`rejected_rating` is missing; provide both `chosen_rating` and',
    ),
    ({'rejected-rating': 1, 'chosen_score': 1, 'rejected_score': 1}, '`chosen-rating` is missing'),
    ({'chosen_score': 1, 'rejected_score': float('nan')}, '`rejected_score`.*finite.*nan'),
    ({'chosen_score': float('-inf'), 'rejected_score': 1}, '`chosen_score`.*finite.*-inf'),
    ({'chosen_score': '9', 'rejected_score': 1}, "`chosen_score`.*finite number, not '9'"),
    ({'chosen_score': True, 'rejected_score': 1}, '`chosen_score`.*not True'),
    ({'chosen_score': 10**400, 'rejected_score': 1}, '`chosen_score`.*finite number'),
  ],
)
def test_invalid_ratings(ratings, message):
  location = Rows([], 'pairs.jsonl').location(6)
  with pytest.raises(ValueError, match=r'^pairs\.jsonl, row 7: ' + f'.*{message}'):
    as_pair(FORMS['messages'] | ratings, location)


BAD = {
  'no_chosen': (
    as_pair,
    {'prompt': 'a', 'rejected': 'b'},
    'no `chosen`.*keys are prompt, rejected',
  ),
  'no_rejected': (as_pair, {'prompt': 'a', 'chosen': 'b'}, 'no `rejected`'),
  'no_prompt': (as_pair, {'chosen': 'a', 'rejected': 'b', 'x': None}, 'keys are chosen, rejected'),
  'other_prompt': (
    as_pair,
    {'chosen': [user('a'), assistant('b')], 'rejected': [user('x'), assistant('c')]},
    'same prompt',
  ),
  'user_last': (
    as_pair,
    {'chosen': [user('a'), user('b')], 'rejected': [user('a'), assistant('c')]},
    "last message of `chosen` is by 'user'",
  ),
  'lone_without_prompt': (
    as_pair,
    {'chosen': [assistant('a')], 'rejected': [assistant('b')]},
    'no prompt in',
  ),
  'answered_prompt': (
    as_pair,
    {'messages': [user('a'), assistant('b')], 'chosen': 'a', 'rejected': 'b'},
    '`messages` is empty or ends in an assistant message',
  ),
  'number': (as_pair, {'prompt': 'a', 'chosen': 1, 'rejected': 'b'}, 'no `chosen` message list'),
  'no_messages': (as_conversation, {'body': 'a'}, 'no `messages` and no `chosen`.*keys are body'),
  'empty_messages': (as_conversation, {'messages': []}, 'non-empty list'),
  'strings': (as_conversation, {'messages': ['a']}, "message 1 of `messages` must be.*not 'a'"),
  'no_content': (
    as_conversation,
    {'messages': [user('a'), {'role': 'assistant'}]},
    'message 2 of `messages`',
  ),
  'content_list': (
    as_conversation,
    {'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]},
    'content: string',
  ),
  'prompt_missing': (as_prompt, {'text': 'a'}, 'no prompt in.*keys are text'),
  'prompt_number': (as_prompt, {'prompt': 3}, '`prompt` must be a non-empty list'),
  'only_answer': (as_prompt, {'messages': [assistant('a')]}, '`messages` is empty or ends'),
}


@pytest.mark.parametrize('case', BAD)
def test_invalid_rows(case):
  read, row, message = BAD[case]
  location = Rows([row], 'pairs.jsonl').location(0)
  with pytest.raises(ValueError, match=r'^pairs\.jsonl, row 1: .*' + message):
    read(row, location)


def test_real_rows(shared_files):
  rows = load_rows(str(shared_files / 'data' / 'hh_harmless' / 'pairs.jsonl.gz'))
  assert len(rows) == 2303
  for index, row in enumerate(rows):
    pair = as_pair(row, rows.location(index))
    assert pair.chosen != pair.rejected
    assert as_prompt(row) == pair.prompt
