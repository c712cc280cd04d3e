"""Warnings about results: each rule holds for figures that are bad, and none for good ones."""

import pytest

from segjax.report.result_warnings import RULES, result_warnings


def figures(before=None, after=None):
  def interval(mean):
    return {'mean': mean, 'low': mean - 1, 'high': mean + 1, 'n': 9}

  after = {'score': 2.0, 'gold': 0.4} | (after or {})
  before = {'score': 1.0, 'gold': -0.2} | (before or {})
  return {
    'before': {name: interval(x) for name, x in before.items()},
    'after': {name: interval(x) for name, x in after.items()} | {'eos_rate': 0.98},
  }


GOOD = {
  'normalizer': {'kind': 'regression', 'r2_mean': 0.3, 'r2_std': 0.1},
  'reward': {'held_out_accuracy': 0.7, 'held_out_length_baseline_accuracy': 0.6},
  'dpo': {'held_out_accuracy': 0.7},
  'evaluate': figures(),
  'sft': {'steps': 4, 'loss': None},
}
BAD = (
  ('normalizer', {'r2_mean': -0.17, 'r2_std': 0.46}, 'worse than a constant, R² -0.17 of the mean'),
  ('normalizer', {'r2_mean': 0.5, 'r2_std': -0.1}, 'weighting=count'),
  ('reward', {'held_out_accuracy': 0.51}, 'is 51%, near that of chance'),
  (
    'reward',
    {'held_out_accuracy': 0.6, 'held_out_length_baseline_accuracy': 0.7},
    'is 60%; that of choosing the longer response is 70%',
  ),
  ('dpo', {'held_out_accuracy': 0.52}, 'implicit reward is right in 52%'),
  ('evaluate', {'after': {'eos_rate': 0.0}}, 'only 0% of the responses end'),
  ('evaluate', figures(after={'gold': -1.0}), 'has fallen from -0.20 to -1.00'),
)


@pytest.mark.parametrize('stage', GOOD)
def test_silent_on_good_results(stage):
  assert result_warnings(stage, GOOD[stage]) == []


@pytest.mark.parametrize('stage, results, words', BAD)
def test_warns_and_names_the_remedy(stage, results, words):
  (text,) = result_warnings(stage, results)
  assert words in text


def test_results_without_figures_are_ignored():
  for stage in GOOD:
    assert result_warnings(stage, {}) == result_warnings(stage, {'after': None}) == []


def test_every_rule_is_tested():
  assert {text for stage, results, _ in BAD for text in _held(stage, results)} == set(RULES)


def _held(stage, results):
  texts = result_warnings(stage, results)
  starts = {rule: rule.text.partition('{')[0] for rule in RULES if rule.stage == stage}
  return [rule for rule, start in starts.items() if any(text.startswith(start) for text in texts)]
