import numpy as np
import pytest
from scipy.stats import spearmanr

from segjax.evaluation.credit_accuracy import ClauseCredit, credit_accuracy, share_on

RNG = np.random.default_rng(0)
RESPONSE = np.repeat(np.arange(40), 3)
TRUTH = RNG.choice([-1.0, 0.5, 1.0], size=120)


def accuracy(credit, truth=TRUTH, response=RESPONSE):
  return credit_accuracy(ClauseCredit(credit, truth, response), seed=0)


@pytest.mark.parametrize('scale', [1.0, 7.0])
def test_the_truth_at_any_scale_is_perfect(scale):
  figures = accuracy(scale * TRUTH)
  assert figures['spearman']['mean'] == pytest.approx(1)
  assert figures['sign']['mean'] == 1
  assert figures['error']['mean'] == pytest.approx(0, abs=1e-6)


def test_no_credit_knows_nothing():
  figures = accuracy(np.zeros(120))
  assert [figures[name]['mean'] for name in ('spearman', 'sign', 'error')] == [0, 0.5, 1]


def test_noise_is_told_from_credit_by_the_intervals():
  noise = accuracy(RNG.normal(size=120))
  assert noise['spearman']['low'] < 0 < noise['spearman']['high']
  assert 0.9 < noise['error']['high'] <= 1
  part = accuracy(TRUTH + RNG.normal(size=120))
  assert part['spearman']['low'] > 0.2 and part['error']['high'] < 0.95


def test_spearman_is_the_mean_within_responses():
  credit = np.round(RNG.normal(size=120), 1)
  values = []
  for index in range(40):
    rows = slice(3 * index, 3 * index + 3)
    if np.ptp(TRUTH[rows]):
      values.append(spearmanr(credit[rows], TRUTH[rows])[0])
  assert accuracy(credit)['spearman']['mean'] == pytest.approx(np.nan_to_num(values).mean())
  # A level of the responses changes nothing: credit is told within each.
  shifted = accuracy(credit + 100 * RESPONSE)
  assert shifted['spearman'] == accuracy(credit)['spearman']


def test_error_is_that_of_least_squares():
  credit = TRUTH + RNG.normal(size=120)
  scale = np.linalg.lstsq(credit[:, None], TRUTH, rcond=None)[0][0]
  expected = np.linalg.norm(scale * credit - TRUTH) / np.linalg.norm(TRUTH)
  assert accuracy(credit)['error']['mean'] == pytest.approx(expected)


def test_share_on_deciding_tokens():
  credit = np.array([[1.0, -3, 0], [2, 0, 0]])
  deciding = np.array([[False, True, True], [False, True, False]])
  assert share_on(credit, deciding, seed=0)['mean'] == pytest.approx(0.5)
  assert share_on(0 * credit, deciding, seed=0)['mean'] is None
