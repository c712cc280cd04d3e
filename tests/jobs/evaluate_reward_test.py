"""The evaluation of a reward model: its tables, and the job on small files."""

import json
from pathlib import Path

import numpy as np
import pytest

from segjax.data.sources import Rows, load_rows
from segjax.evaluation import reward_bench
from segjax.evaluation.pair_scores import pair_figures
from segjax.jobs import evaluate_reward


def test_all_cut_leaves_nothing_untruncated_and_sections_are_shown(capsys):
  names = [name for section in reward_bench.SECTIONS.values() for name in section]
  scored = np.tile([1.0, 0, 2, 3], (len(names), 1))
  found = pair_figures(scored, names, np.ones(len(names), bool))
  assert found['untruncated'] is None and found['reward_bench']['Score'] == 1.0
  evaluate_reward.print_table({'pairs': found})
  out = capsys.readouterr().out
  assert 'Chat Hard' in out and 'RewardBench' in out
  assert max(map(len, out.splitlines())) <= 100


def test_subset_source_or_file():
  rows = Rows([{'subset': 'x', 'source': 'y'}, {'source': 'y'}, {}], 'f.jsonl')
  assert [evaluate_reward.subset_name(rows, i) for i in range(3)] == ['x', 'y', 'f.jsonl']


@pytest.fixture(scope='module')
def inputs(language, small, one_device, tmp_path_factory):
  """A reward model of two steps and the demo's pairs."""
  from segjax.jobs import pipeline

  model, rows = str(language / 'model'), str(language / 'rows' / 'pairs.jsonl.gz')
  workdir = tmp_path_factory.mktemp('judged')
  values = small('reward', 'normalizer', **{'policy.path': model, 'data.path': rows})
  pipeline.run(pipeline.prepare(values, workdir, one_device), workdir, 0.0)
  return {'reward_model.path': str(workdir / 'reward' / 'model'), 'reference.path': model}, rows


@pytest.mark.campaign
def test_job_agrees_with_training(small, run, inputs, tmp_path):
  """The held-out pairs have the figures that reward training computed for them."""
  paths, pairs = inputs
  held_out_file = tmp_path / 'held_out.jsonl'
  training = json.loads((_parent(paths) / 'stage.json').read_text())['results']
  held_out = json.loads((_parent(paths) / 'held_out.json').read_text())
  rows = load_rows(pairs)
  held_out_file.write_text(
    ''.join(json.dumps(rows[i] | {'subset': f's{i % 2}'}) + '\n' for i in held_out)
  )
  spans_file = tmp_path / 'spans.jsonl'
  text = rows[0]['chosen']
  span = {'start': 0, 'end': 5, 'type': 'slip'}
  row = {'messages': rows[0]['messages'], 'response': text, 'spans': [span]}
  spans_file.write_text(json.dumps(row) + '\n' + json.dumps(row) + '\n')
  overrides = {
    **paths,
    'evaluate_reward.pairs': f'{held_out_file},{held_out_file}',
    'evaluate_reward.spans': str(spans_file),
    'evaluate_reward.batch_size': 8,
  }
  results = run(small('evaluate_reward', **overrides))['evaluate_reward']
  assert results['pairs']['all']['accuracy']['mean'] == pytest.approx(training['held_out_accuracy'])
  assert results['pairs']['all']['margin'] == pytest.approx(training['held_out_margin'], abs=1e-5)
  assert set(results['pairs']['subsets']) == {'s0', 's1'}
  assert results['pairs_read'] == 2 * len(held_out) and results['spans']['normalized']
  assert results['spans']['types']['slip']['spans'] == 2
  written = json.loads((tmp_path / 'evaluate_reward' / 'results.json').read_text())
  assert written['pairs'] == results['pairs'] and written['spans'] == results['spans']


def _parent(paths):
  return Path(paths['reward_model.path']).parent


@pytest.mark.campaign
def test_missing_reference_is_an_error_before_anything_is_loaded(small, run, inputs):
  paths, pairs = inputs
  overrides = {'reward_model.path': paths['reward_model.path'], 'data.path': pairs}
  with pytest.raises(ValueError, match=r'config.reference.path is empty, but this reward model'):
    run(small('evaluate_reward', **overrides))


@pytest.mark.campaign
def test_files_of_the_wrong_form_are_named(small, run, inputs, tmp_path):
  wrong = tmp_path / 'wrong.jsonl'
  wrong.write_text('{"text": "a"}\n')
  for key, message in (('pairs', 'no `chosen`'), ('spans', 'no marked response')):
    with pytest.raises(ValueError, match=rf'wrong.jsonl, row 1: {message}'):
      run(small('evaluate_reward', **inputs[0], **{f'evaluate_reward.{key}': str(wrong)}))
