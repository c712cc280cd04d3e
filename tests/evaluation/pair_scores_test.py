"""Figures of scored preference pairs."""

import numpy as np

from segjax.evaluation.pair_scores import pair_figures


def test_pair_figures_by_subset():
  # Scores of chosen and rejected, then their lengths.
  scored = np.array([[1.0, 0, 3, 2], [0, 1, 3, 2], [2, 2, 5, 5], [3, 0, 1, 2]])
  figures = pair_figures(scored, ['a', 'a', 'b', 'b'], np.array([1, 0, 0, 0], bool))
  assert figures['all']['accuracy']['mean'] == (1 + 0 + 0.5 + 1) / 4
  assert figures['subsets']['a']['accuracy']['mean'] == 0.5
  accuracy = figures['subsets']['b']['accuracy']
  assert (accuracy['mean'], accuracy['n']) == (0.75, 2)
  assert figures['subsets']['a']['length_baseline_accuracy'] == 1.0
  assert figures['all']['margin'] == 0.75
  assert figures['untruncated']['accuracy']['n'] == 3 and figures['truncated'] == 1
  assert figures['reward_bench'] == {}
  low, high = (figures['all']['accuracy'][key] for key in ('low', 'high'))
  assert 0 < low < 0.625 < high < 1
