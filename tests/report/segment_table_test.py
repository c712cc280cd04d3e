"""A response printed as one line per segment."""

import numpy as np

from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.report.segment_table import format_segments, print_segments

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


def test_table_shows_available_numbers_and_escapes_control_characters(capsys):
  first = Segment('a\x1b[31m', ['a\x1b[31m'], [0.5], score=1.0, normalized_score=-0.25)
  second = Segment(' b', [' b'], [None], score=None, normalized_score=None)
  print_segments(AnnotatedResponse([], 'a b', [first, second]))
  assert capsys.readouterr().out.splitlines() == [
    'segment    tokens  entropy   score  normalised score',
    '────────────────────────────────────────────────────',
    'a\\x1b[31m       1     0.50  +1.000            -0.250',
    'b               1        –       –                 –',
    '',
  ]
