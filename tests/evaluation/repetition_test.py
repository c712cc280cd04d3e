"""Repetition in n-grams, worked by hand."""

import numpy as np
import pytest

from segjax.evaluation import repetition


@pytest.mark.parametrize(
  'tokens, n, expected',
  [
    ([1, 2, 3, 4], 4, 0.0),
    ([1, 2, 3], 4, None),
    ([], 4, None),
    ([1, 2, 1, 2, 1, 2], 4, 1 / 3),  # 1212 2121 1212: two distinct of three
    ([7] * 10, 4, 6 / 7),
    ([1, 1, 2], 1, 1 / 3),
  ],
)
def test_repeated_share(tokens, n, expected):
  assert repetition.repeated_share(tokens, n) == (
    None if expected is None else pytest.approx(expected)
  )


def test_distinct_is_over_all_responses():
  # 1 2, 2 3 and 1 2 again: 2 of 3 pairs are distinct; none spans two responses.
  assert repetition.distinct([[1, 2, 3], [1, 2]], 2) == pytest.approx(2 / 3)
  assert repetition.distinct([[1, 2, 3], [1, 2]], 1) == pytest.approx(3 / 5)
  assert repetition.distinct([[], [1]], 2) == 0


def test_short_responses_have_no_repeated_share():
  metrics = repetition.repetition_metrics([[7] * 10, [1, 2]])
  assert metrics['repeated_4grams'] == pytest.approx(6 / 7)
  assert repetition.repetition_metrics([[], []]) == {
    'repeated_4grams': 0.0,
    'distinct_1': 0.0,
    'distinct_2': 0.0,
  }


def test_arrays_equal_lists():
  lists = [[7] * 10, [1, 2]]
  arrays = [np.array(tokens, np.int32) for tokens in lists]
  assert repetition.repetition_metrics(arrays) == repetition.repetition_metrics(lists)
