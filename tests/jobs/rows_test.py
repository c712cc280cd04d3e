"""Rows of jobs: a held-out share, rows of one stage, rows that are dropped, other forms."""

import gzip
import json

import pytest

from segjax.jobs import pipeline
from segjax.jobs.registry import JOBS
from segjax.run import inputs


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture(scope='module')
def chats(language):
  with gzip.open(language / 'rows' / 'sft.jsonl.gz', 'rt') as file:
    return [json.loads(line) for line in file]


@pytest.mark.campaign
def test_held_out_and_bad_rows_of_another_form(small, run, language, tmp_path, chats, capsys):
  names = {'user': 'human', 'assistant': 'gpt', 'system': 'system'}
  rows = [
    {'conversations': [{'from': names[m['role']], 'value': m['content']} for m in row['messages']]}
    for row in chats
  ]
  rows[3:3] = [{'conversations': []}, {'conversations': [{'from': 'narrator', 'value': 'x'}]}]
  values = {
    'policy.path': str(language / 'model'),
    'data.path': write(tmp_path / 'share.jsonl', rows),
    'sft.holdout_fraction': 0.25,
    'sft.eval_every': 1,
  }
  with pytest.raises(ValueError, match=r'share\.jsonl, row 4: `conversations` must be a non-empty'):
    run(small('sft', **values), tmp_path / 'error')
  capsys.readouterr()

  results = run(small('sft', **values, **{'data.bad_rows': 'drop'}))['sft']
  out = capsys.readouterr().out
  assert '34 rows, 2 dropped bad; 32 used' in out
  assert out.count('dropped by data.bad_rows=drop, the first of these rows: share.jsonl') == 1
  assert out.count("share.jsonl, row 1: role 'human' is read as user") == 1
  assert out.count("role 'gpt' is read as assistant") == 1

  assert results['rows'] + results['held_out_rows'] == 32
  assert 8 <= results['held_out_rows'] <= 12  # whole prompts
  lines = [json.loads(x) for x in (tmp_path / 'sft' / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['eval/loss'] for line in lines]
  assert len(losses) == 2 and losses[1] < losses[0]
  assert losses[1] == pytest.approx(results['held_out_loss'], rel=1e-6)
  assert f'loss on {results["held_out_rows"]} held-out rows' in out


def test_rows_of_one_stage(small, tmp_path):
  settings = small(
    *('sft', 'reward', 'ppo'),
    **{
      'data.path': 'common.jsonl',
      'data.split': 'train[:9]',
      'sft.data.path': 'chats.jsonl',
      'ppo.data.split': 'test',
    },
  )
  expected = {
    'sft': ('chats.jsonl', 'train[:9]'),
    'reward': ('common.jsonl', 'train[:9]'),
    'ppo': ('common.jsonl', 'test'),
  }
  for name, (path, split) in expected.items():
    data = pipeline.connect_stage(JOBS[name], settings, tmp_path).data
    assert (data.path, data.split) == (path, split)


def test_every_source_is_checked_before_the_run(small, one_device, tmp_path, language):
  path = str(language / 'rows' / 'sft.jsonl.gz')
  for value, message in (
    (f'{path}*2,nowhere.jsonl', r"config\.data\.path\[1\]='nowhere\.jsonl' does not exist"),
    (f'{tmp_path}/none*', r'config\.data\.path: .*none\*: no file matches'),
  ):
    with pytest.raises(ValueError, match=message):
      pipeline.prepare(small('sft', **{'data.path': value}), tmp_path, one_device)
  with pytest.raises(ValueError, match=r"config\.sft\.data\.path='nowhere\.jsonl' does not exist"):
    pipeline.prepare(small('sft', **{'sft.data.path': 'nowhere.jsonl'}), tmp_path, one_device)
  (stage,) = pipeline.prepare(
    small('sft', **{'sft.data.path': f'{path}*2, {path}'}), tmp_path, one_device
  )
  assert len(inputs.load_config_rows(stage.settings.data)) == 96


def test_settings_of_rows(small):
  for values, message in (
    ({'data.bad_rows': 'skip'}, r"data\.bad_rows='skip' is not one of error, drop"),
    ({'sft.eval_every': 2}, r'sft\.eval_every=2 needs held-out conversations'),
    ({'sft.holdout_fraction': 1.0}, r'sft\.holdout_fraction=1\.0 must be'),
    ({'sft.eval_every': -1}, r'sft\.eval_every=-1 must be at least 0'),
  ):
    with pytest.raises(ValueError, match=message):
      small('sft', **values)
