"""A response printed as a paragraph, and as a table of its segments."""

import sys

import numpy as np
import pytest
from tqdm.utils import disp_len

from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.report.segment_table import print_response, print_segments

# Segments [the cat] [sat], and a stop token outside of both.
TEXTS, SEGMENT_ID = ['the', ' cat', ' sat', '<end>'], np.array([0, 0, 1, -1])
REWARD = np.array([0.5, 0.25, -1, 9])


def test_a_response_is_one_paragraph_with_the_reward_of_each_segment(capsys):
  print_response(TEXTS, SEGMENT_ID, REWARD)
  assert capsys.readouterr().out == '    the cat [+0.75] sat [-1.00]\n'


def test_space_at_a_segments_end_stays_behind_its_reward(capsys):
  print_response(['the cat ', 'sat'], np.array([0, 1]), np.array([1.0, 2.0]))
  assert capsys.readouterr().out == '    the cat [+1.00] sat [+2.00]\n'


def test_segments_are_coloured_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.delenv('NO_COLOR', raising=False)
  print_response(TEXTS, SEGMENT_ID, REWARD)
  green, red, dim, end = (f'\033[{code}m' for code in (32, 31, 2, 0))
  assert capsys.readouterr().out == (
    f'    {green}the{end} {green}cat{end} {dim}[+0.75]{end} {red}sat{end} {dim}[-1.00]{end}\n'
  )
  monkeypatch.setenv('NO_COLOR', '1')
  print_response(TEXTS, SEGMENT_ID, REWARD)
  assert capsys.readouterr().out == '    the cat [+0.75] sat [-1.00]\n'


def test_an_empty_response_says_so(capsys):
  print_response([], np.zeros(0, int), np.zeros(0))
  assert capsys.readouterr().out == '    (no content)\n'


@pytest.mark.parametrize('columns', [80, 120])
def test_a_long_response_is_wrapped(capsys, monkeypatch, columns):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', str(columns))
  monkeypatch.setenv('NO_COLOR', '1')
  text = 'Dear \x1b[31m reader,\n\n' + 'many words to read ' * 20 + '日本' * 30
  print_response([text, 'un', 'said'], np.array([0, 1, 2]), np.array([1.0, -2, 3]))
  first, *lines = capsys.readouterr().out.splitlines()
  assert first == '    Dear \\x1b[31m reader,'  # a line break of the response stays one
  assert all(line.startswith('    ') and disp_len(line) <= columns for line in lines)
  assert len(lines) < 8 and lines[-1].endswith('[+1.00]un [-2.00]said [+3.00]')


def test_table_shows_available_numbers_and_escapes_control_characters(capsys):
  first = Segment('a\x1b[31m', ['a\x1b[31m'], [0.5], score=1.0, normalized_score=-0.25)
  second = Segment(' b', [' b'], [None], score=None, normalized_score=None)
  print_segments(AnnotatedResponse([], 'a b', [first, second]))
  assert capsys.readouterr().out.splitlines() == [
    'tokens  entropy   score  normalised score  segment',
    '────────────────────────────────────────────────────',
    '     1     0.50  +1.000            -0.250  a\\x1b[31m',
    '     1        –       –                 –  b',
    '',
  ]


def test_table_has_a_column_for_each_part_of_the_reward(capsys):
  first = Segment('a', ['a'], [0.5], score=None, reward=0.5, parts={'brief': -0.25, 'rm': 0.75})
  second = Segment(' b', [' b'], [0.25], score=None, reward=1.0, parts={'brief': 1.0, 'rm': None})
  print_segments(AnnotatedResponse([], 'a b', [first, second]))
  assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
    ['tokens', 'entropy', 'reward', 'brief', 'rm', 'segment'],
    ['─' * 48],
    ['1', '0.50', '+0.500', '-0.250', '+0.750', 'a'],
    ['1', '0.25', '+1.000', '+1.000', '–', 'b'],
    [],
  ]


@pytest.mark.parametrize('columns', [40, 80, 120])
def test_a_long_segment_hides_no_number(capsys, monkeypatch, columns):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', str(columns))
  text = ' ' + 'many words to read, ' * 20 + '日本' * 60 + 'the end'
  print_segments(AnnotatedResponse([], text, [Segment(text, [text], [0.5], score=-1.25)]))
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith('     1     0.50  -1.250  many words ') and lines[-2].endswith('end')
  assert max(map(disp_len, lines)) <= max(columns, 25 + 20)
