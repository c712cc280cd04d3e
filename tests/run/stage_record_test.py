"""When a stage is reused, resumed or run again."""

import json
from pathlib import Path

import pytest

from segjax.run import stage_record

KEY = {'settings': {'seed': 0, 'sft': {'max_steps': 2}}, 'inputs': {'data.path': 'abc'}}


def _with(section, **values):
  return KEY | {section: KEY[section] | values}


def _finished(directory, key=KEY):
  stage_record.prepare_directory(directory, key)
  (directory / 'model').write_text('weights')
  return stage_record.record_results(
    directory, key, {'loss': 1.5, 'shape': (1, 2)}, {'model': 'hash'}
  )


def test_finished_stage_is_reused_only_by_its_key_and_output(tmp_path):
  stage = tmp_path / 'sft'
  results = _finished(stage)
  assert results == {'loss': 1.5, 'shape': [1, 2]}
  assert stage_record.load_results_if_valid(stage, KEY, {'model': 'hash'}) == results
  assert stage_record.load_results_if_valid(stage, KEY, {'model': 'other'}) is None
  assert (
    stage_record.load_results_if_valid(stage, _with('settings', seed=1), {'model': 'hash'}) is None
  )
  assert stage_record.load_results_if_valid(tmp_path / 'nothing', KEY, {}) is None


def test_unfinished_stage_of_the_same_key_is_kept(tmp_path):
  stage = tmp_path / 'sft'
  assert stage_record.prepare_directory(stage, KEY) == ''
  (stage / 'checkpoint').write_text('2')
  assert stage_record.load_results_if_valid(stage, KEY, {}) is None
  assert stage_record.prepare_directory(stage, KEY) == ''
  assert (stage / 'checkpoint').exists()


@pytest.mark.parametrize(
  'key, reason',
  [
    (_with('settings', seed=1), 'seed changed'),
    (_with('settings', sft={'max_steps': 3}), 'sft.max_steps changed'),
    (_with('inputs', **{'data.path': 'def'}), 'content of data.path changed'),
  ],
)
@pytest.mark.parametrize('is_finished', [True, False])
def test_another_key_moves_the_old_directory_aside(tmp_path, key, reason, is_finished):
  stage = tmp_path / 'sft'
  if is_finished:
    _finished(stage)
  else:
    stage_record.prepare_directory(stage, KEY)
    (stage / 'model').write_text('weights')
  assert stage_record.prepare_directory(stage, key) == reason
  assert not (stage / 'model').exists()
  assert (tmp_path / 'sft.old' / 'model').read_text() == 'weights'


def test_only_the_previous_directory_is_kept(tmp_path):
  stage = tmp_path / 'sft'
  for seed in range(3):
    stage_record.prepare_directory(stage, _with('settings', seed=seed))
    (stage / 'model').write_text(str(seed))
  assert (stage / 'model').read_text() == '2'
  assert (tmp_path / 'sft.old' / 'model').read_text() == '1'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['sft', 'sft.old']


def test_a_stage_without_outputs_does_not_replace_the_old_one(tmp_path):
  stage = tmp_path / 'sft'
  _finished(stage)
  assert (
    stage_record.prepare_directory(stage, _with('settings', seed=1)) == 'seed changed'
  )  # a path was mistyped
  assert stage_record.prepare_directory(stage, _with('settings', seed=2)) == ''
  assert (tmp_path / 'sft.old' / 'model').exists()


@pytest.mark.parametrize('has_begun', [True, False])
def test_earlier_settings_restore_their_directory(tmp_path, has_begun):
  stage, other = tmp_path / 'sft', _with('settings', seed=1)
  results = _finished(stage)
  stage_record.prepare_directory(stage, other)
  if has_begun:
    (stage / 'checkpoint').write_text('2')
  stage_record.restore_old(stage, KEY)
  assert stage_record.load_results_if_valid(stage, KEY, {'model': 'hash'}) == results
  stage_record.restore_old(stage, other)
  assert (stage / 'checkpoint').exists() == has_begun
  assert sorted(p.name for p in tmp_path.iterdir()) == ['sft', 'sft.old']


def test_restore_keeps_a_directory_of_the_same_key(tmp_path):
  stage = tmp_path / 'sft'
  stage_record.restore_old(stage, KEY)
  assert not stage.exists()
  results = _finished(stage)
  stage_record.restore_old(stage, KEY)
  assert stage_record.load_results_if_valid(stage, KEY, {'model': 'hash'}) == results


def test_damaged_output_and_foreign_directory_are_moved_aside(tmp_path):
  _finished(tmp_path / 'sft')
  assert stage_record.prepare_directory(tmp_path / 'sft', KEY) == 'its output was changed'
  (tmp_path / 'ppo').mkdir()
  (tmp_path / 'ppo' / 'notes').write_text('mine')
  assert 'without a stage.json' in stage_record.prepare_directory(tmp_path / 'ppo', KEY)


def test_content_hash_covers_names_and_bytes_except_skipped_files(tmp_path):
  def write(name, **files):
    for file, text in files.items():
      (tmp_path / name).mkdir(exist_ok=True)
      (tmp_path / name / file).write_text(text)
    return stage_record.content_hash(tmp_path / name, skip=('note',))

  first = write('a', x='1', y='2')
  assert write('b', x='1', y='2') == first
  assert write('b', note='3') == first
  assert write('c', x='12', y='') != first
  assert write('d', x='1', z='2') != first
  assert write('b', y='3') != first
  assert stage_record.content_hash(tmp_path / 'a' / 'x') == stage_record.content_hash(
    tmp_path / 'd' / 'x'
  )


@pytest.mark.parametrize('renames', [1, 2])
@pytest.mark.parametrize('next_seed', [0, 1, 2])
def test_a_swap_that_was_killed_loses_no_directory(tmp_path, monkeypatch, renames, next_seed):
  """Killed after each rename, then started with the key of either directory or with a new one."""
  stage, keys = tmp_path / 'sft', [_with('settings', seed=seed) for seed in range(3)]
  for key in keys[:2]:
    stage_record.prepare_directory(stage, key)
    (stage / 'model').write_text(str(key['settings']['seed']))
  rename, count = Path.rename, 0

  def killed_rename(path, target):
    nonlocal count
    if count == renames:
      raise KeyboardInterrupt
    count += 1
    return rename(path, target)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Path, 'rename', killed_rename)
    stage_record.restore_old(stage, keys[0])
  stage_record.restore_old(stage, keys[next_seed])
  stage_record.prepare_directory(stage, keys[next_seed])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['sft', 'sft.old']
  if next_seed < 2:
    assert (stage / 'model').read_text() == str(next_seed)
    assert (tmp_path / 'sft.old' / 'model').read_text() == str(1 - next_seed)
  stage_record.restore_old(stage, keys[0])  # a leftover would stop this swap
  assert not (tmp_path / 'sft.spare').exists()


@pytest.mark.parametrize(
  'edit',
  [
    lambda record: record | {'results': {'loss': 0.0}},
    lambda record: record | {'results': 3},
    lambda record: {k: v for k, v in record.items() if k != 'outputs'},
    lambda record: [record],
    lambda record: record | {'key': 'all'},
    lambda record: record | {'key': {'settings': 3}},
  ],
)
def test_an_edited_record_is_not_believed(tmp_path, edit):
  stage = tmp_path / 'sft'
  _finished(stage)
  file = stage / stage_record.FILE
  file.write_text(json.dumps(edit(json.loads(file.read_text()))))
  assert stage_record.load_results_if_valid(stage, KEY, {'model': 'hash'}) is None
  assert stage_record.FILE in stage_record.prepare_directory(stage, KEY)


def test_changes_are_named_by_what_they_are():
  before = {
    'settings': {'seed': 0},
    'functions': {'reward_shaping.reward_fn': 'rules:f abc'},
    'versions': {'jax': '0.8', 'segjax source': 'a' * 64},
  }
  now = {
    'settings': {'seed': 1},
    'functions': {'reward_shaping.reward_fn': 'rules:f def'},
    'versions': {'jax': '0.9', 'segjax source': 'b' * 64},
  }
  assert stage_record.changed_keys(before, now) == [
    'seed',
    'source of reward_shaping.reward_fn',
    'version of jax (0.8, now 0.9)',
    'version of segjax source',
  ]
