"""The figures of sampled responses, and win rates over those of another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation.policy_figures import (
  EvaluatedResponses,
  boundary_f1,
  by_response,
  gains,
  pairwise_win_rates,
  response_figures,
)
from segjax.types import Experience, Rollout, Segments


class _Words:
  """Three words, of which '.' ends a clause."""

  def decode(self, ids, **_):
    return ''.join(('a', 'b', '.')[i] for i in ids)


_TOKENIZER = ChatTokenizer(_Words(), stop_ids=(2,), pad_id=0, turn_end='', turn_close='')


def _experience(ids, ends, mask, finished):
  ids, ends, mask = jnp.array(ids), jnp.array(ends, bool), jnp.array(mask, bool)
  zeros, length = jnp.zeros(ids.shape), jnp.ones(len(ids), jnp.int32)
  rollout = Rollout(ids, length, ids, mask, jnp.array(finished), zeros)
  segments = Segments(ends, ends, jnp.zeros(ids.shape, jnp.int32), ends.sum(1))
  return Experience(rollout, zeros, zeros, zeros, segments, reward=zeros, advantage=zeros)


@pytest.mark.parametrize(
  'ends, expected',
  [
    ([0, 1, 0, 0, 1, 0], 1.0),  # the one inner '.'; the last content token is excluded
    ([1, 1, 0, 0, 1, 0], 2 / 3),  # one right, one wrong: precision 1/2, recall 1
    ([1, 0, 0, 0, 1, 0], 0.0),
    ([0, 0, 0, 0, 1, 0], 0.0),
  ],
)
def test_boundary_f1(ends, expected):
  # a . b b . <stop>, finished: the stop token is not content, the last '.' is excluded.
  experience = _experience([[0, 2, 1, 1, 2, 2]], [ends], [[1] * 6], [True])
  f1 = boundary_f1(experience, _TOKENIZER, lambda token: token == '.')
  assert f1 == pytest.approx(expected, abs=1e-6)  # float32


def test_boundary_f1_without_any_boundary_is_zero():
  experience = _experience([[0, 1]], [[0, 1]], [[1, 1]], [False])
  assert boundary_f1(experience, _TOKENIZER, lambda token: token == '.') == 0


def _sampled(score, gold, texts):
  prompt = np.arange(len(texts)) // 2
  scores = None if score is None else np.array(score)
  return EvaluatedResponses(None, scores, prompt, [''] * len(texts), texts, np.array(gold))


def test_win_rates_by_score_and_gold_reward_count_ties_half():
  after = _sampled([1.0, 2, 3, 4], [1.0, 0, 1, 1], ['a', 'bb', 'c', 'dd'])
  before = _sampled([0.0, 2, 4, 3], [0.0, 0, 0, 0], ['a', 'b', 'c', 'd'])
  figures = pairwise_win_rates(after, before, 0)
  assert figures['win_rate_score']['mean'] == (1 + 0.5 + 0 + 1) / 4
  assert figures['win_rate_gold']['mean'] == (1 + 0.5 + 1 + 1) / 4
  assert set(figures) == {f'{lc}win_rate_{j}' for lc in ('', 'lc_') for j in ('score', 'gold')}


def test_win_rates_over_the_same_responses_are_even():
  responses = _sampled(None, [1.0, 3], ['long', 's'])
  figures = pairwise_win_rates(responses, responses, 0)
  assert set(figures) == {'win_rate_gold', 'lc_win_rate_gold'}
  assert figures['win_rate_gold']['mean'] == 0.5
  assert figures['lc_win_rate_gold']['mean'] == pytest.approx(0.5, abs=1e-9)


def test_figures_of_responses():
  # 0 1 0 1 0 1 <stop>, finished: 4-grams 0101 1010 0101; the stop token is not content.
  experience = _experience([[0, 1, 0, 1, 0, 1, 2]], [[0] * 7], [[1] * 7], [True])
  experience = jax.device_get(experience)
  figures = response_figures(
    EvaluatedResponses(experience, np.ones(1), np.zeros(1, int), [''], ['a'], None)
  )
  assert figures['repeated_4grams'] == pytest.approx(1 / 3)
  assert (figures['length'], figures['distinct_1']) == (7.0, pytest.approx(1 / 3))
  assert figures['score']['mean'] == 1 and figures['kl_nats'] == 0


def test_gains_are_paired_differences():
  """Prompts 0 and 1 gain 1 and 2; the means of the models vary far more between prompts."""
  before = _sampled(None, [0.0, 0.0, 10.0, 10.0], 'abcd')
  after = _sampled(None, [1.0, 1.0, 12.0, 12.0], 'abcd')
  (name,) = figures = gains(after, before)
  assert name == 'gold_gain' and figures[name]['mean'] == 1.5
  assert figures[name]['high'] - figures[name]['low'] == pytest.approx(2 * 1.96 * 0.5)


def test_figures_of_each_response_are_kept_by_model():
  experience = _experience([[0, 1, 2]] * 2, [[0, 0, 1]] * 2, [[1, 1, 1], [1, 1, 0]], [True, False])
  before = EvaluatedResponses(
    experience, None, np.array([0, 1]), ['p', 'q'], ['ab.', 'ab'], np.array([0.25, -1.0])
  )
  columns = by_response({'before': before, 'after': before._replace(score=np.array([1.0, 2.0]))})
  assert columns == {
    'prompt': [0, 1],
    'before': {'length': [3, 2], 'gold': [0.25, -1.0]},
    'after': {'length': [3, 2], 'score': [1.0, 2.0], 'gold': [0.25, -1.0]},
  }
