"""The kinds of normaliser, and which scores each is fitted to."""

import importlib

import numpy as np
import pytest

from segjax.jobs import normalizer
from segjax.jobs.normalizer import Statistics
from segjax.types import Normalizer


@pytest.fixture(scope='module')
def statistics():
  """200 responses of 10 segments, score = 0.5 ln p + 1 plus noise of deviation 0.2."""
  position = np.tile(np.arange(1, 11) / 10, 200).astype(np.float32)
  noise = np.random.default_rng(0).normal(0, 0.2, position.shape)
  score = (0.5 * np.log(position) + 1 + noise).astype(np.float32)
  return Statistics(position, score, score.reshape(200, 10).sum(axis=1))


def test_regression_finds_the_line(statistics):
  fitted = normalizer.fit('regression', statistics)
  # 200 scores a bin: the mean is known to 0.2 / sqrt(200) = 0.014, the deviation to 0.01.
  np.testing.assert_allclose(
    [fitted.w_mean, fitted.b_mean, fitted.w_std, fitted.b_std], [0.5, 1, 0, 0.2], atol=0.04
  )


@pytest.mark.parametrize('kind', ['global', 'last', 'scalar'])
def test_constants_are_mean_and_deviation_of_their_scores(statistics, kind):
  fitted = normalizer.fit(kind, statistics)
  scores = {
    'global': statistics.score,
    'last': statistics.score[9::10],
    'scalar': statistics.response_score,
  }[kind]
  np.testing.assert_allclose(fitted.b_mean, scores.mean(), rtol=1e-5)
  np.testing.assert_allclose(fitted.b_std, scores.std(), rtol=1e-5)
  assert (fitted.w_mean, fitted.w_std) == (0, 0)


def test_none_changes_nothing(statistics):
  assert normalizer.fit('none', statistics) == Normalizer()


def test_no_segment_is_an_error():
  with pytest.raises(ValueError, match='no response with a segment'):
    normalizer.fit('regression', Statistics(*np.zeros((3, 0), np.float32)))


def test_auto_is_by_granularity():
  kinds = [normalizer.resolve_kind('auto', name) for name in ('segment', 'token', 'bandit')]
  assert kinds == ['regression', 'regression', 'scalar']
  with pytest.raises(ValueError, match=r'config.normalizer.kind regression .* use scalar'):
    normalizer.resolve_kind('regression', 'bandit')


def test_the_demo_weighs_bins_by_their_scores():
  """As in the demo: bins of 1,000 scores, and six of one score each from a response of 7 segments.

  With equal weights these six make the line worse than a constant for all other scores.
  """
  rng = np.random.default_rng(0)
  counts = np.array([2, 3, 4, 5]).repeat(1000)
  segments = [np.arange(1, n + 1) / n for n in (*counts, 7)]
  position = np.concatenate(segments).astype(np.float32)
  score = rng.normal(-np.log(position) - 1, 4).astype(np.float32)
  score[-7:-1] = rng.normal(-8, 1, 6)
  strays = Statistics(position, score, np.zeros(len(segments), np.float32))
  weighting = importlib.import_module('configs.ppo').get_config('demo').normalizer.weighting
  quality = {}
  for name in ('uniform', weighting):
    fitted = normalizer.fit('regression', strays, weighting=name)
    quality[name] = normalizer.fit_quality(strays, fitted, lambda _: None, weighting='count')
  assert quality['uniform']['r2_mean'] < 0 < 0.8 < quality[weighting]['r2_mean']
