"""A reward model against human judgements: figures by hand, spans, the job on small files."""

import json
from pathlib import Path

import numpy as np
import pytest

from segjax.data.sources import Rows, load_rows
from segjax.data.span_annotations import Span, TokenizedSpans
from segjax.evaluation import reward_bench, span_auc
from segjax.jobs import evaluate_reward


def _marked(length, *spans, cut=None):
  """One token per character, of which the first `cut` were kept."""
  owner = np.arange(length)
  owner[cut or length :] = -1
  return TokenizedSpans([1] * (length + 2), 2, True, owner, tuple(Span(*span) for span in spans))


# Ten characters in segments of two.
SEGMENT = np.arange(10) // 2


def _rewards(low):
  """-1 in the segments that hold the characters of `low`, and 1 elsewhere."""
  reward = np.ones(10)
  reward[np.isin(SEGMENT, SEGMENT[list(low)])] = -1
  return reward, SEGMENT


def test_constructed_rewards_find_every_span():
  marked = [_marked(10, (2, 4, 'a')), _marked(10, (6, 8, 'b'), (0, 2, 'a'))]
  found = span_auc.figures(marked, [_rewards([2]), _rewards([0, 6])], 0)
  assert found['auc']['mean'] == found['auc_within']['mean'] == 1.0
  assert (found['auc']['low'], found['auc']['high']) == (1.0, 1.0)
  assert [found[key] for key in ('spans', 'spans_cut', 'characters')] == [3, 0, 20]
  assert found['marked'] == 0.3
  # The other type's characters are neither sought nor counted as errors that were not.
  assert {kind: one['auc']['mean'] for kind, one in found['types'].items()} == {'a': 1.0, 'b': 1.0}


def test_half_a_span_in_a_low_segment():
  # Marked: characters 1 and 2, of the low segment 0 and the high segment 1. Outside: 0 low, and 7
  # high. P = (1·7 + 1·1/2 + 1·7/2) / (2·8) = 11/16.
  found = span_auc.figures([_marked(10, (1, 3, 'a'))], [_rewards([0])], 0)
  assert found['auc']['mean'] == pytest.approx(11 / 16)
  assert found['auc']['low'] is None


def test_cut_characters_count_nowhere():
  marked = [_marked(10, (0, 2, 'a'), (8, 10, 'a'), cut=6)]
  reward, segment = _rewards([0])
  found = span_auc.figures(marked, [(reward[:6], segment[:6])], 0)
  assert found['auc']['mean'] == 1.0
  assert (found['characters'], found['spans_cut']) == (6, 1)


def test_rewards_that_know_nothing_are_at_a_half():
  rng = np.random.default_rng(0)
  marked, rewards = [], []
  for _ in range(200):
    start = int(rng.integers(0, 8))
    marked.append(_marked(10, (start, start + 2, 'a')))
    rewards.append((rng.normal(size=5)[SEGMENT], SEGMENT))
  found = span_auc.figures(marked, rewards, 0)
  for name in ('auc', 'auc_within'):
    assert found[name]['low'] < 0.5 < found[name]['high'] and found[name]['high'] < 0.6


def test_a_segment_has_the_reward_of_its_end():
  reward, end = np.array([9.0, 1, 9, 9, 2]), np.array([0, 1, 0, 0, 1], bool)
  found, _ = span_auc._by_token(reward, end, np.array([0, 0, 1, 1, 1]))
  assert found.tolist() == [1, 1, 2, 2, 2]
  none, _ = span_auc._by_token(reward, np.zeros(5, bool), np.full(5, -1))
  assert none.tolist() == [0] * 5


def test_pair_figures_by_subset():
  # chosen, rejected, lengths of both
  scored = np.array([[1.0, 0, 3, 2], [0, 1, 3, 2], [2, 2, 5, 5], [3, 0, 1, 2]])
  found = evaluate_reward.pair_figures(scored, ['a', 'a', 'b', 'b'], np.array([1, 0, 0, 0], bool))
  assert found['all']['accuracy']['mean'] == (1 + 0 + 0.5 + 1) / 4
  assert found['subsets']['a']['accuracy']['mean'] == 0.5
  assert found['subsets']['b']['accuracy'] | {'low': 0, 'high': 0} == {
    'mean': 0.75,
    'low': 0,
    'high': 0,
    'n': 2,
  }
  assert found['subsets']['a']['length_baseline_accuracy'] == 1.0
  assert found['all']['margin'] == 0.75
  assert found['untruncated']['accuracy']['n'] == 3 and found['truncated'] == 1
  assert found['reward_bench'] == {}
  low, high = (found['all']['accuracy'][key] for key in ('low', 'high'))
  assert 0 < low < 0.625 < high < 1


def test_all_cut_leaves_nothing_untruncated_and_sections_are_shown(capsys):
  names = [name for section in reward_bench.SECTIONS.values() for name in section]
  scored = np.tile([1.0, 0, 2, 3], (len(names), 1))
  found = evaluate_reward.pair_figures(scored, names, np.ones(len(names), bool))
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


def test_missing_reference_is_an_error_before_anything_is_loaded(small, run, inputs):
  paths, pairs = inputs
  overrides = {'reward_model.path': paths['reward_model.path'], 'data.path': pairs}
  with pytest.raises(ValueError, match=r'config.reference.path is empty, but this reward model'):
    run(small('evaluate_reward', **overrides))


def test_files_of_the_wrong_form_are_named(small, run, inputs, tmp_path):
  wrong = tmp_path / 'wrong.jsonl'
  wrong.write_text('{"text": "a"}\n')
  for key, message in (('pairs', 'no `chosen`'), ('spans', 'no marked response')):
    with pytest.raises(ValueError, match=rf'wrong.jsonl, row 1: {message}'):
      run(small('evaluate_reward', **inputs[0], **{f'evaluate_reward.{key}': str(wrong)}))
