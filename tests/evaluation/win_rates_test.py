"""Win rates, plain and at equal length, worked by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from segjax.evaluation import win_rates


def test_outcomes():
  outcome = win_rates.outcomes(np.array([1.0, 0, 2]), np.array([0.0, 0, 3]))
  assert outcome.tolist() == [1, 0.5, 0]


def test_win_rate_stays_in_bounds():
  rate = win_rates.win_rate(np.ones(20), np.arange(20), 0)
  assert (rate['mean'], rate['low'], rate['high']) == (1, 1, 1)
  few = win_rates.win_rate(np.array([1.0, 0, 1, 1]), np.arange(4), 0)
  assert 0 <= few['low'] < 0.75 < few['high'] <= 1


def test_wins_due_to_length_alone_are_removed():
  # The longer response always wins, and the model writes the longer one in 3 of 4 cases: a win
  # rate of 0.75 due to length alone.
  length, baseline = np.array([30, 30, 30, 10] * 25), np.array([10, 10, 10, 30] * 25)
  outcome = (length > baseline).astype(float)
  rate = win_rates.length_controlled(outcome, length, baseline, np.arange(100), 0)
  assert rate['mean'] == pytest.approx(0.5, abs=0.15)
  assert rate['length_effect'] > 3 and np.isfinite(rate['length_effect'])


def test_equally_many_wins_due_to_length_give_one_half():
  length, baseline = np.array([30, 10] * 10), np.array([10, 30] * 10)
  outcome = (length > baseline).astype(float)
  rate = win_rates.length_controlled(outcome, length, baseline, np.arange(20), 0)
  assert rate['mean'] == pytest.approx(0.5, abs=1e-9)


def test_length_without_effect_changes_nothing():
  length, baseline = np.array([30, 10, 30, 10] * 25), np.array([10, 30, 10, 30] * 25)
  outcome = np.array([1.0, 1, 1, 1, 0, 0, 1, 1] * 12 + [1, 1, 0, 0])
  rate = win_rates.length_controlled(outcome, length, baseline, np.arange(100), 0)
  assert rate['mean'] == pytest.approx(outcome.mean(), abs=1e-3)  # the ridge shrinks it a little
  assert rate['low'] < rate['mean'] < rate['high']


def test_equal_lengths_give_the_plain_win_rate():
  outcome, length = np.array([1.0, 1, 0, 0.5] * 10), np.full(40, 7)
  rate = win_rates.length_controlled(outcome, length, length, np.arange(40), 0)
  assert rate['mean'] == pytest.approx(outcome.mean(), abs=1e-3)


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_separable_preferences_stay_finite(value):
  length, baseline = np.array([3, 4, 5]), np.array([1, 1, 1])
  rate = win_rates.length_controlled(np.full(3, value), length, baseline, np.arange(3), 0)
  assert 0 < rate['mean'] < 1 and abs(rate['mean'] - value) < 0.3
  single = win_rates.length_controlled(
    np.array([value]), length[:1], baseline[:1], np.array([0]), 0
  )
  assert single['low'] is None and 0 < single['mean'] < 1


@pytest.mark.parametrize('bias', [0.0, 3.0, 40.0])
def test_fit_equals_scikit_learn(bias):
  rng = np.random.default_rng(1)
  length, baseline = rng.integers(1, 200, 300), rng.integers(1, 200, 300)
  feature = win_rates.length_feature(length, baseline)
  outcome = (rng.random(300) < 1 / (1 + np.exp(-0.4 - bias * feature))).astype(float)
  weight = rng.integers(1, 4, 300)
  model = LogisticRegression(C=1 / win_rates.RIDGE, fit_intercept=False, tol=1e-10, max_iter=10000)
  model.fit(np.column_stack([np.ones(300), feature]), outcome, sample_weight=weight)
  (coefficients,) = win_rates.fit_logistic(outcome, feature, weight[None], np.zeros((1, 2)))
  np.testing.assert_allclose(coefficients, model.coef_[0], rtol=1e-3, atol=1e-4)  # scikit-learn's


def test_bootstrap_resamples_prompts_not_responses():
  rng = np.random.default_rng(2)
  outcome = rng.integers(0, 2, 20).astype(float)
  length, baseline = rng.integers(1, 50, 20), rng.integers(1, 50, 20)
  args = (outcome, length, baseline)
  once = win_rates.length_controlled(*args, np.arange(20), 0)
  tenfold = (np.tile(x, 10) for x in args)
  repeated = win_rates.length_controlled(*tenfold, np.tile(np.arange(20), 10), 0)
  width = [rate['high'] - rate['low'] for rate in (once, repeated)]
  assert width[1] == pytest.approx(width[0], rel=0.1)
