"""The fit over all segments: which kind, and of what."""

import numpy as np
import pytest

from segjax.jobs import normalizer
from segjax.types import Normalizer


def _scores():
  """200 responses of 10 segments, score = 0.5 ln p + 1 plus noise of deviation 0.2."""
  position = np.tile(np.arange(1, 11) / 10, 200).astype(np.float32)
  noise = np.random.default_rng(0).normal(0, 0.2, position.shape)
  return position, (0.5 * np.log(position) + 1 + noise).astype(np.float32)


def test_regression_finds_the_line():
  fitted = normalizer.fit('regression', *_scores())
  # 200 scores a bin: the mean is known to 0.2 / sqrt(200) = 0.014, the deviation to 0.01.
  np.testing.assert_allclose(
    [fitted.w_mean, fitted.b_mean, fitted.w_std, fitted.b_std], [0.5, 1, 0, 0.2], atol=0.04
  )


def test_scalar_is_mean_and_deviation():
  position, score = _scores()
  fitted = normalizer.fit('scalar', position, score)
  np.testing.assert_allclose(fitted.b_mean, score.mean(), rtol=1e-5)
  np.testing.assert_allclose(fitted.b_std, score.std(), rtol=1e-3)  # or by n - 1
  assert (fitted.w_mean, fitted.w_std) == (0, 0)


def test_none_changes_nothing():
  assert normalizer.fit('none', *_scores()) == Normalizer()


def test_no_segment_is_an_error():
  with pytest.raises(ValueError, match='no segment to fit'):
    normalizer.fit('regression', np.zeros(0, np.float32), np.zeros(0, np.float32))
