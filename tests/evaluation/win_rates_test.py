"""Win rates as they are and at equal length, by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from segjax.evaluation import win_rates


def test_outcomes():
  found = win_rates.outcomes(np.array([1.0, 0, 2]), np.array([0.0, 0, 3]))
  assert found.tolist() == [1, 0.5, 0]


def test_win_rate_stays_in_bounds():
  found = win_rates.win_rate(np.ones(20), np.arange(20), 0)
  assert (found['mean'], found['low'], found['high']) == (1, 1, 1)
  few = win_rates.win_rate(np.array([1.0, 0, 1, 1]), np.arange(4), 0)
  assert 0 <= few['low'] < 0.75 < few['high'] <= 1


def test_length_that_explains_all_leaves_nothing():
  # The longer response always wins, and the model writes the longer one in 3 of 4 cases: a win
  # rate of 0.75 that is due to length alone.
  length, other = np.array([30, 30, 30, 10] * 25), np.array([10, 10, 10, 30] * 25)
  outcome = (length > other).astype(float)
  found = win_rates.length_controlled(outcome, length, other, np.arange(100), 0)
  assert found['mean'] == pytest.approx(0.5, abs=0.15)
  assert found['length_effect'] > 3 and np.isfinite(found['length_effect'])


def test_length_that_explains_all_evenly_is_exactly_a_half():
  length, other = np.array([30, 10] * 10), np.array([10, 30] * 10)
  outcome = (length > other).astype(float)
  found = win_rates.length_controlled(outcome, length, other, np.arange(20), 0)
  assert found['mean'] == pytest.approx(0.5, abs=1e-9)


def test_length_that_explains_nothing_changes_nothing():
  length, other = np.array([30, 10, 30, 10] * 25), np.array([10, 30, 10, 30] * 25)
  outcome = np.array([1.0, 1, 1, 1, 0, 0, 1, 1] * 12 + [1, 1, 0, 0])
  found = win_rates.length_controlled(outcome, length, other, np.arange(100), 0)
  assert found['mean'] == pytest.approx(outcome.mean(), abs=1e-3)  # the ridge takes a little
  assert found['low'] < found['mean'] < found['high']


def test_equal_lengths_give_the_plain_win_rate():
  outcome, length = np.array([1.0, 1, 0, 0.5] * 10), np.full(40, 7)
  found = win_rates.length_controlled(outcome, length, length, np.arange(40), 0)
  assert found['mean'] == pytest.approx(outcome.mean(), abs=1e-3)


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_separable_data_stay_finite(value):
  length, other = np.array([3, 4, 5]), np.array([1, 1, 1])
  found = win_rates.length_controlled(np.full(3, value), length, other, np.arange(3), 0)
  assert 0 < found['mean'] < 1 and abs(found['mean'] - value) < 0.3
  one = win_rates.length_controlled(np.array([value]), length[:1], other[:1], np.array([0]), 0)
  assert one['low'] is None and 0 < one['mean'] < 1


@pytest.mark.parametrize('bias', [0.0, 3.0, 40.0])
def test_fit_is_that_of_scikit_learn(bias):
  rng = np.random.default_rng(1)
  length, other = rng.integers(1, 200, 300), rng.integers(1, 200, 300)
  feature = win_rates.length_feature(length, other)
  outcome = (rng.random(300) < 1 / (1 + np.exp(-0.4 - bias * feature))).astype(float)
  weight = rng.integers(1, 4, 300)
  model = LogisticRegression(C=1 / win_rates.RIDGE, fit_intercept=False, tol=1e-10, max_iter=10000)
  model.fit(np.column_stack([np.ones(300), feature]), outcome, sample_weight=weight)
  (found,) = win_rates.fit(outcome, feature, weight[None], np.zeros((1, 2)))
  np.testing.assert_allclose(found, model.coef_[0], rtol=1e-3, atol=1e-4)  # scikit-learn's own


def test_bootstrap_counts_prompts_not_responses():
  rng = np.random.default_rng(2)
  outcome = rng.integers(0, 2, 20).astype(float)
  length, other = rng.integers(1, 50, 20), rng.integers(1, 50, 20)
  args = (outcome, length, other)
  once = win_rates.length_controlled(*args, np.arange(20), 0)
  tenfold = (np.tile(x, 10) for x in args)
  again = win_rates.length_controlled(*tenfold, np.tile(np.arange(20), 10), 0)
  width = [found['high'] - found['low'] for found in (once, again)]
  assert width[1] == pytest.approx(width[0], rel=0.1)
