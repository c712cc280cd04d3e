"""Tokens on disk: equal to those of the rows, found again, rebuilt where they are damaged."""

import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from segjax.data import lazy_rows, sources, token_cache, token_store
from segjax.data.batches import split_holdout
from segjax.data.lazy_rows import LazyRows
from segjax.data.limits import Limits
from segjax.data.pair_rules import DEFAULT_RULES, PairRules
from segjax.data.rows import Reading
from segjax.data.tokenize import (
  tokenize_conversations,
  tokenize_pairs,
  tokenize_prompts,
  tokenize_steps,
)

LIMITS = Limits(max_length=64, max_prompt_length=32)
KINDS = [tokenize_conversations, tokenize_pairs, tokenize_steps, tokenize_prompts]
ROWS = [
  {
    'conversations': [{'from': 'human', 'value': f'hello {i % 7}'}],
    'chosen': 'one ' * i,
    'rejected': f'two {i}',
    'steps': [[3, 1], [4 * i - 1, 0.25]] if i > 1 else [],
  }
  for i in range(30)
]


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """The directory of the cache; small sources are kept there too."""
  monkeypatch.setattr(lazy_rows, '_MANY_BYTES', 0)
  monkeypatch.setattr('segjax.data.tokenize._CHUNK', 8)
  monkeypatch.setenv(token_cache.VARIABLE, str(tmp_path / 'cache'))
  return tmp_path / 'cache'


class Source:
  """A file of rows, and the lines that are logged while they are read."""

  def __init__(self, path, rows=ROWS):
    self.path, self.lines = path, []
    self.write(rows)

  def write(self, rows):
    self.path.write_text(''.join(json.dumps(row) + '\n' for row in rows))

  def open(self, **reading):
    self.lines = []
    return lazy_rows.open_rows(
      str(self.path), 'train', 0, Reading(log=self.lines.append, drop_bad=True, **reading)
    )


@pytest.fixture
def source(tmp_path):
  return Source(tmp_path / 'rows.jsonl')


def entries(cache):
  return sorted(path for path in cache.iterdir() if path.is_dir())


def assert_equal(a, b):
  assert (a.counts, a.length, a.pad_id) == (b.counts, b.length, b.pad_id)
  indices = np.arange(len(a))
  batches = [jax.tree.leaves(data.gather(indices)) for data in (a, b)]
  for x, y in zip(*batches, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
  for name in ('group', 'row', 'truncated', 'rating_gap'):
    np.testing.assert_array_equal(getattr(a, name, None), getattr(b, name, None))


@pytest.mark.parametrize('tokenize', KINDS)
def test_tokens_are_those_of_the_rows_and_are_read_once(
  cache, source, llama3, tokenize, monkeypatch
):
  expected = tokenize(sources.load_rows(str(source.path)), llama3, LIMITS)
  first = tokenize(source.open(), llama3, LIMITS)
  lines = source.lines
  monkeypatch.setattr(LazyRows, 'located', None)  # rows are not read again
  rows = source.open()
  second = tokenize(rows, llama3, LIMITS)
  assert source.lines == lines and len(lines) == 1 and 'row 1: role' in lines[0]
  assert 'loaded' not in vars(rows)
  for dataset in (first, second):
    assert_equal(dataset, expected)
  for a, b in zip(split_holdout(second, 0.3, 1), split_holdout(expected, 0.3, 1), strict=True):
    assert_equal(a, b)
  if tokenize is tokenize_prompts:
    assert second.messages(3) == expected.messages(3)


def test_what_tokens_depend_on_is_in_the_key(cache, source, llama3, chatml):
  def tokenize(tokenizer=llama3, limits=LIMITS, rules=DEFAULT_RULES, columns=None):
    tokenize_pairs(source.open(columns=columns or {}), tokenizer, limits, rules)
    return len(entries(cache))

  assert [tokenize(), tokenize()] == [1, 1]
  assert tokenize(chatml) == 2
  assert tokenize(limits=Limits(64, 32, 'drop')) == 3
  assert tokenize(rules=PairRules(keep_identical=True)) == 4
  assert tokenize(columns={'chosen': 'rejected', 'rejected': 'chosen'}) == 5
  tokenize_prompts(source.open(), llama3, LIMITS)
  assert len(entries(cache)) == 6
  source.write([dict(row, chosen='three') for row in ROWS])
  assert tokenize() == 7
  data = tokenize_pairs(source.open(), llama3, LIMITS)
  assert_equal(data, tokenize_pairs(sources.load_rows(str(source.path)), llama3, LIMITS))


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'index', 'no index', 'no file'])
def test_damaged_entries_are_rebuilt_with_one_line(cache, source, llama3, damage):
  expected = tokenize_pairs(sources.load_rows(str(source.path)), llama3, LIMITS)
  tokenize_pairs(source.open(), llama3, LIMITS)
  (entry,) = entries(cache)
  file = entry / ('entry.json' if 'index' in damage else 'rejected')
  data = bytearray(file.read_bytes())
  if damage.startswith('no'):
    file.unlink()
  elif damage == 'flipped':
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  else:
    file.write_bytes(data[: len(data) // 2])
  for count in (1, 0):
    assert_equal(tokenize_pairs(source.open(), llama3, LIMITS), expected)
    damaged = [line for line in source.lines if 'again' in line]
    assert len(damaged) == count and all(str(entry) in line for line in damaged)


@pytest.mark.parametrize('chunks', [0, 2, 3])
def test_a_full_disk_keeps_tokens_in_memory(cache, source, llama3, monkeypatch, chunks):
  expected = tokenize_pairs(sources.load_rows(str(source.path)), llama3, LIMITS)
  write, calls = token_store.Sink._write, []

  def fail(sink, columns):
    calls.append(columns)
    if len(calls) > chunks:
      with (sink._directory / 'chosen').open('ab') as file:
        file.write(b'torn')
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(sink, columns)

  monkeypatch.setattr(token_store.Sink, '_write', fail)
  assert_equal(tokenize_pairs(source.open(), llama3, LIMITS), expected)
  assert [line for line in source.lines if 'No space left' in line] == source.lines[-1:]
  assert not entries(cache)


def test_a_cache_that_cannot_be_written(cache, source, llama3):
  cache.write_text('a file')
  expected = tokenize_pairs(sources.load_rows(str(source.path)), llama3, LIMITS)
  assert_equal(tokenize_pairs(source.open(), llama3, LIMITS), expected)
  assert 'not on disk' in source.lines[0]


def test_rows_that_change_while_the_run_reads_them(cache, source, llama3):
  tokenize_prompts(source.open(), llama3, LIMITS)
  prompts = tokenize_prompts(source.open(), llama3, LIMITS)
  source.write(ROWS[1:])
  with pytest.raises(ValueError, match=r'rows\.jsonl has changed'):
    prompts.messages(0)


def test_entries_that_are_not_used_are_removed(cache, source, llama3):
  tokenize_prompts(source.open(), llama3, LIMITS)
  (old,) = entries(cache)
  os.utime(old, (0, 0))
  tokenize_pairs(source.open(), llama3, LIMITS)
  assert len(entries(cache)) == 1 and old not in entries(cache)


def test_rows_of_the_hub_have_the_fingerprint_of_datasets(cache, llama3, monkeypatch):
  import datasets

  data = datasets.Dataset.from_list([{'prompt': f'hello {i}'} for i in range(30)])
  monkeypatch.setattr(datasets, 'load_dataset', lambda name, split: data)
  monkeypatch.setattr(lazy_rows, '_MANY_ROWS', 10)
  first = tokenize_prompts(lazy_rows.open_rows('owner/name', 'train', 0, Reading()), llama3, LIMITS)
  monkeypatch.setattr(LazyRows, 'located', None)  # rows are not read again
  rows = lazy_rows.open_rows('owner/name', 'train', 0, Reading())
  assert_equal(tokenize_prompts(rows, llama3, LIMITS), first)
  for path, limit in (('owner/name*0.5', 0), ('owner/name', 20)):
    assert lazy_rows.open_rows(path, 'train', limit, Reading()).fingerprint != rows.fingerprint
  assert not lazy_rows.open_rows('owner/name', 'train', 5, Reading()).fingerprint


def test_bad_rows_leave_nothing_behind(cache, source, llama3):
  source.write([*ROWS, {'prompt': 'a'}])
  rows = lazy_rows.open_rows(str(source.path), 'train', 0, Reading())
  with pytest.raises(ValueError, match=r'rows\.jsonl, row 31: no `chosen`'):
    tokenize_pairs(rows, llama3, LIMITS)
  assert not entries(cache)


@pytest.mark.processes
def test_workers_give_the_same_tokens_lines_and_errors(cache, source, llama3, monkeypatch):
  bad = [{'prompt': 'a'}, *[dict(row, conversations=[]) for row in ROWS[:2]]]
  source.write([*ROWS[:20], *bad, *ROWS])
  expected = [tokenize(source.open(), llama3, LIMITS) for tokenize in KINDS]
  lines = source.lines
  monkeypatch.setattr('segjax.data.json_rows._IN_MEMORY', 300)  # rows are sent as text
  monkeypatch.setattr('segjax.data.tokenize._MANY', 1)
  monkeypatch.setattr('segjax.data.token_workers.count_workers', lambda: 2)
  monkeypatch.setenv(token_cache.VARIABLE, '')
  for tokenize, data in zip(KINDS, expected, strict=True):
    assert_equal(tokenize(source.open(), llama3, LIMITS), data)
  assert source.lines == lines and len(lines) == 2
  with pytest.raises(ValueError, match=r'rows\.jsonl, row 21: no `chosen`'):
    tokenize_pairs(sources.load_rows(str(source.path)), llama3, LIMITS)
  monkeypatch.setattr('sys.executable', '/bin/false')  # workers that end at once
  assert_equal(tokenize_pairs(source.open(), llama3, LIMITS), expected[1])


@pytest.mark.processes
def test_workers_do_not_import_jax():
  script = "import sys, segjax.data.token_workers; print('jax' in sys.modules)"
  process = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  assert process.stdout.split() == ['False']
