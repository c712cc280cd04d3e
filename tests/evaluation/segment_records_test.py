"""Segments as records: the score of their last token, numbers that JSON can hold."""

import numpy as np

from segjax.evaluation.segment_records import make_segments


def test_segments_have_the_score_of_their_last_token():
  segment_id = np.array([0, 0, 1, -1])
  entropy, score = np.array([9.0, 0.5, np.inf, 1.0]), np.array([0.0, 0.25, 0.5, 7.0])
  one, two = make_segments(['a', ' b', ' c', '<e>'], segment_id, entropy, score, reward=[1.0, -1.0])
  assert (one.text, one.score, one.reward) == ('a b', 0.25, 1.0)
  assert (two.tokens, two.entropy, two.score) == ([' c'], [None], 0.5)  # JSON has no infinity
  assert make_segments([], np.array([], int), entropy, None) == []
