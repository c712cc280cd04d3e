"""AUC of segment rewards against annotated spans, on constructed rewards."""

import numpy as np
import pytest

from segjax.data.span_annotations import Span, TokenizedSpans
from segjax.evaluation import span_auc


def _annotated(length, *spans, num_kept=None):
  """One token per character, of which the first `num_kept` are left."""
  owner = np.arange(length)
  owner[num_kept or length :] = -1
  return TokenizedSpans([1] * (length + 2), 2, True, owner, tuple(Span(*span) for span in spans))


# Ten characters in segments of two.
SEGMENT = np.arange(10) // 2


def _rewards(low):
  """-1 in the segments that hold the characters of `low`, and 1 elsewhere."""
  reward = np.ones(10)
  reward[np.isin(SEGMENT, SEGMENT[list(low)])] = -1
  return reward, SEGMENT


def test_low_rewards_on_every_span_have_auc_1():
  annotated = [_annotated(10, (2, 4, 'a')), _annotated(10, (6, 8, 'b'), (0, 2, 'a'))]
  figures = span_auc.figures(annotated, [_rewards([2]), _rewards([0, 6])], 0)
  assert figures['auc']['mean'] == figures['auc_within']['mean'] == 1.0
  assert (figures['auc']['low'], figures['auc']['high']) == (1.0, 1.0)
  assert [figures[key] for key in ('spans', 'spans_cut', 'characters')] == [3, 0, 20]
  assert figures['marked'] == 0.3
  # Characters of the other type count neither as positives nor as negatives.
  assert set(figures['types']) == {'a', 'b'}
  assert all(values['auc']['mean'] == 1.0 for values in figures['types'].values())


def test_half_of_a_span_in_a_low_segment():
  # Annotated: characters 1 and 2, of the low segment 0 and the high segment 1. Outside: 0 low, and
  # 7 high. P = (1·7 + 1·1/2 + 1·7/2) / (2·8) = 11/16.
  figures = span_auc.figures([_annotated(10, (1, 3, 'a'))], [_rewards([0])], 0)
  assert figures['auc']['mean'] == pytest.approx(11 / 16)
  assert figures['auc']['low'] is None


def test_truncated_characters_are_excluded():
  annotated = [_annotated(10, (0, 2, 'a'), (8, 10, 'a'), num_kept=6)]
  reward, segment = _rewards([0])
  figures = span_auc.figures(annotated, [(reward[:6], segment[:6])], 0)
  assert figures['auc']['mean'] == 1.0
  assert (figures['characters'], figures['spans_cut']) == (6, 1)


def test_random_rewards_have_auc_one_half():
  rng = np.random.default_rng(0)
  annotated, rewards = [], []
  for _ in range(200):
    start = int(rng.integers(0, 8))
    annotated.append(_annotated(10, (start, start + 2, 'a')))
    rewards.append((rng.normal(size=5)[SEGMENT], SEGMENT))
  figures = span_auc.figures(annotated, rewards, 0)
  for name in ('auc', 'auc_within'):
    assert figures[name]['low'] < 0.5 < figures[name]['high'] and figures[name]['high'] < 0.6


def test_a_segment_has_the_reward_of_its_end():
  reward, end = np.array([9.0, 1, 9, 9, 2]), np.array([0, 1, 0, 0, 1], bool)
  by_token, _ = span_auc._by_token(reward, end, np.array([0, 0, 1, 1, 1]))
  assert by_token.tolist() == [1, 1, 2, 2, 2]
  none, _ = span_auc._by_token(reward, np.zeros(5, bool), np.full(5, -1))
  assert none.tolist() == [0] * 5
