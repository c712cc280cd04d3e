"""Intervals and the area under the ROC curve, worked by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from segjax.evaluation import intervals
from segjax.evaluation.intervals import RankedTokens


def test_interval_comes_from_the_means_of_prompts():
  # Two prompts have the means 1 and 4, whose standard error is (3 / sqrt 2) / sqrt 2 = 1.5.
  estimate = intervals.clustered_interval(np.array([0.0, 2, 4, 4]), np.array([0, 0, 1, 1]))
  assert estimate['mean'] == 2.5 and estimate['n'] == 4
  interval = [estimate['low'], estimate['high']]
  np.testing.assert_allclose(interval, [2.5 - 2.94, 2.5 + 2.94], rtol=1e-12)


def test_one_prompt_has_no_interval():
  assert intervals.clustered_interval(np.array([1.0, 2]), np.array([0, 0]))['low'] is None


@pytest.mark.parametrize(
  'wins, total, expected',
  [
    # z² = 3.8416: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    (5.0, 10, ((0.5 + 0.19208 - 0.364602) / 1.38416, (0.5 + 0.19208 + 0.364602) / 1.38416)),
    (0.0, 10, (0.0, 0.38416 / 1.38416)),
    (10.0, 10, (1 / 1.38416, 1.0)),
    (0.0, 0, (0.0, 1.0)),
  ],
)
def test_wilson(wins, total, expected):
  np.testing.assert_allclose(intervals.wilson(wins, total), expected, atol=1e-6)


def test_bootstrap_draws_clusters():
  # The values of a cluster are equal, so all variance is between the clusters.
  values, cluster = np.repeat([0.0, 1.0], [50, 50]), np.repeat([0, 1], [50, 50])
  estimate = intervals.bootstrap_mean(values, cluster, 0)
  assert (estimate['mean'], estimate['low'], estimate['high'], estimate['n']) == (
    0.5,
    0.0,
    1.0,
    100,
  )
  assert estimate == intervals.bootstrap_mean(values, cluster, 0)


def test_bootstrap_interval_approaches_the_normal_formula():
  rng = np.random.default_rng(0)
  values, cluster = rng.normal(size=400), np.arange(400)
  estimate, formula = (
    intervals.bootstrap_mean(values, cluster, 1),
    intervals.clustered_interval(values, cluster),
  )
  np.testing.assert_allclose(
    [estimate['low'], estimate['high']], [formula['low'], formula['high']], atol=0.02
  )


def test_bootstrap_of_one_cluster_has_no_interval():
  estimate = intervals.bootstrap_mean(np.array([1.0, 3]), np.array([0, 0]), 0)
  assert (estimate['mean'], estimate['low']) == (2.0, None)


def _rows(score, inside, outside, cluster=None):
  cluster = np.zeros(len(score), int) if cluster is None else np.array(cluster)
  return RankedTokens(np.array(score, float), np.array(inside), np.array(outside), cluster)


@pytest.mark.parametrize(
  'score, inside, outside, expected',
  [
    ([2, 1], [1, 0], [0, 1], 1.0),
    ([1, 2], [1, 0], [0, 1], 0.0),
    ([1, 1], [1, 0], [0, 1], 0.5),
    # 2 positive at 3; 1 positive and 1 negative tie at 2; 3 negative at 1: 11.5 of 3 x 4 pairs.
    ([3, 2, 1], [2, 1, 0], [0, 1, 3], 11.5 / 12),
  ],
)
def test_auc_by_hand(score, inside, outside, expected):
  assert intervals.auc(_rows(score, inside, outside)) == pytest.approx(expected, abs=1e-12)


def test_auc_equals_scikit_learn_with_ties():
  rng = np.random.default_rng(3)
  score = rng.integers(0, 6, 40)
  inside, outside = rng.integers(0, 4, 40), rng.integers(0, 4, 40)
  labels = np.concatenate([np.repeat([1, 0], [i, o]) for i, o in zip(inside, outside, strict=True)])
  expected = roc_auc_score(labels, np.repeat(score, inside + outside))
  assert intervals.auc(_rows(score, inside, outside)) == pytest.approx(expected, abs=1e-12)


def test_auc_needs_units_of_both_kinds():
  estimate = intervals.auc_interval(_rows([1, 2], [0, 0], [1, 1], [0, 1]), 0)
  assert estimate == {'mean': None, 'low': None, 'high': None, 'n': 2}
  assert intervals.auc_within(_rows([1, 2], [0, 0], [1, 1], [0, 1]), 0)['mean'] is None
  assert intervals.auc_interval(_rows([], [], []), 0)['mean'] is None


def test_interval_of_random_scores_contains_one_half():
  rng = np.random.default_rng(5)
  cluster = np.repeat(np.arange(100), 20)
  inside = rng.integers(0, 2, len(cluster))
  rows = _rows(rng.normal(size=len(cluster)), inside, 1 - inside, cluster)
  for estimate in (intervals.auc_interval(rows, 0), intervals.auc_within(rows, 0)):
    assert estimate['low'] < 0.5 < estimate['high'] and estimate['high'] - estimate['low'] < 0.08
    assert estimate['n'] == 100


def test_auc_within_does_not_compare_responses():
  # The positive row is higher in each response, but the second response is lower overall.
  rows = _rows([11, 10, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 4, 4])
  assert intervals.auc_within(rows, 0)['mean'] == 1.0
  assert intervals.auc(rows) == 0.75


def test_responses_are_resampled_completely():
  # A draw has all rows of a response or none: the AUC of one response is 1 or 0, of both 0.5.
  rows = _rows([2, 1, 1, 2], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1])
  estimate = intervals.auc_interval(rows, 0)
  assert (estimate['mean'], estimate['low'], estimate['high']) == (0.5, 0.0, 1.0)
