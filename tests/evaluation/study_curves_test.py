"""Gold at equal KL: worked numbers and slow loops."""

import itertools
import math

import numpy as np
import pytest

from segjax.evaluation.study_curves import Curve, best_of_n, first_reached


@pytest.fixture
def curve():
  """Two prompts; KL 0, 2, 6 and 10 nats."""
  return Curve(np.array([0.0, 2.0, 6.0, 10.0]), np.array([[0, 0.2], [1, 0.4], [2, 0.8], [1, 0.8]]))


def test_gold_at_a_level_is_interpolated_by_prompt(curve):
  np.testing.assert_allclose(curve.at(4), [1.5, 0.6])
  np.testing.assert_allclose(curve.at(6), [2, 0.8])
  np.testing.assert_allclose(curve.at(0), [0, 0.2])
  np.testing.assert_allclose(curve.at(10), [1, 0.8])
  assert curve.at(10.5) is None


def test_area_is_the_mean_on_the_way(curve):
  # Means 0.1, 0.7, 1.4, 0.9: trapezoids of 2, 4 and 4 nats, then 2 at the last value.
  by_hand = (2 * 0.4 + 4 * 1.05 + 4 * 1.15 + 2 * 0.9) / 12
  assert curve.area(12) == pytest.approx(by_hand)
  assert curve.area(1) == pytest.approx((0.1 + 0.4) / 2)
  fine = np.linspace(0, 12, 12_001)
  slow = np.trapezoid([np.mean(Curve.at(curve, min(x, 10.0))) for x in fine], fine) / 12
  assert curve.area(12) == pytest.approx(slow, abs=1e-3)


def test_a_run_that_never_moved_keeps_its_gold():
  curve = first_reached(np.array([-1e-7, -2e-7]), np.array([[0.5], [0.7]]))
  assert curve.kl.tolist() == [0.0] and curve.area(8) == 0.5
  assert curve.at(4) is None and curve.at(0) == [0.5]


def test_a_level_is_that_of_the_first_policy_that_reached_it():
  kl = np.array([1e-7, 3.0, 2.0, 3.0, 5.0, np.nan, np.inf])
  gold = np.arange(7.0)[:, None]
  curve = first_reached(kl, gold)
  assert curve.kl.tolist() == [0.0, 3.0, 5.0] and curve.gold[:, 0].tolist() == [0.0, 1.0, 4.0]
  assert kl[0] == 1e-7  # the caller's array is left as it is


def test_best_of_n_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  score, gold = rng.normal(size=(2, 10))
  prompt = np.array([0, 1] * 5)
  curve = best_of_n(score, gold, prompt)
  assert curve.kl == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
  for row, n in zip(curve.gold, (1, 2, 4), strict=True):
    for index in (0, 1):
      members = np.flatnonzero(prompt == index)
      best = [max(group, key=lambda i: score[i]) for group in itertools.combinations(members, n)]
      assert row[index] == pytest.approx(gold[best].mean())
