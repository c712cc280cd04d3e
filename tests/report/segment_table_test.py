"""A response as lines of segments."""

import numpy as np

from segjax.report.segment_table import format_segments

WORDS = ('the', 'cat', 'sat', 'down')


def _decode(ids):
  return ' '.join(WORDS[i] for i in ids)


def test_one_line_per_segment_with_the_sum_of_its_rewards():
  # Segments [the cat] [sat], and a stop token outside of both.
  lines = format_segments(
    np.array([0, 1, 2, 3]), np.array([0, 0, 1, -1]), np.array([0.5, 0.25, -1, 9]), _decode
  )
  assert lines == [' +0.75  the cat', ' -1.00  sat']


def test_empty_response_has_no_line():
  assert format_segments(np.zeros(0, int), np.zeros(0, int), np.zeros(0), _decode) == []
