"""The figures of an evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.config.settings import Evaluate
from segjax.data.tokenizer import ChatTokenizer
from segjax.jobs import evaluate
from segjax.jobs.evaluate import EvaluatedResponses
from segjax.types import Experience, Rollout, Segments


def test_functions_are_found_by_name():
  gold, boundary = evaluate.load_eval_functions(
    Evaluate(gold_reward_fn='operator:eq', boundary_fn='')
  )
  assert gold('a', 'a') and boundary is None


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
  return Experience(rollout, zeros, zeros, zeros, zeros, segments, zeros, zeros, zeros, mask)


@pytest.mark.parametrize(
  'ends, expected',
  [
    ([0, 1, 0, 0, 1, 0], 1.0),  # found: the one inner '.'; the end of the last is given anyway
    ([1, 1, 0, 0, 1, 0], 2 / 3),  # one right, one wrong: precision 1/2, recall 1
    ([1, 0, 0, 0, 1, 0], 0.0),
    ([0, 0, 0, 0, 1, 0], 0.0),
  ],
)
def test_boundary_f1(ends, expected):
  # a . b b . <stop>, finished: the stop token is no content, the last '.' is left out.
  experience = _experience([[0, 2, 1, 1, 2, 2]], [ends], [[1] * 6], [True])
  f1 = evaluate.boundary_f1(experience, _TOKENIZER, lambda token: token == '.')
  assert f1 == pytest.approx(expected, abs=1e-6)  # float32


def test_boundary_f1_without_any_boundary_is_zero():
  experience = _experience([[0, 1]], [[0, 1]], [[1, 1]], [False])
  assert evaluate.boundary_f1(experience, _TOKENIZER, lambda token: token == '.') == 0


def test_figures_fit_a_page(capsys):
  one = {'mean': -0.5, 'low': -0.61, 'high': -0.4, 'n': 3}
  figures = {'gold': one, 'kl_nats': -1e-9, 'length': 10.0, 'segments': 2.0, 'eos_rate': 1.0}
  wins = {'win_rate_gold': one, 'lc_win_rate_score': one, 'repeated_4grams': 0.125}
  evaluate.print_table({'before': figures | {'boundary_f1': 0.96}, 'after': figures | wins})
  out = capsys.readouterr().out
  assert '-0.500 [-0.610, -0.400]' in out
  assert 'win rate by gold reward' in out and '0.125' in out
  assert '0.960' in out and '-0.00 ' not in out
  assert max(map(len, out.splitlines())) <= 100


def _sampled(score, gold, texts):
  prompt = np.arange(len(texts)) // 2
  scores = None if score is None else np.array(score)
  return EvaluatedResponses(None, scores, prompt, [''] * len(texts), texts, np.array(gold))


def test_comparison_has_both_judges_and_ties_count_half():
  after = _sampled([1.0, 2, 3, 4], [1.0, 0, 1, 1], ['a', 'bb', 'c', 'dd'])
  before = _sampled([0.0, 2, 4, 3], [0.0, 0, 0, 0], ['a', 'b', 'c', 'd'])
  found = evaluate.win_rates(after, before, 0)
  assert found['win_rate_score']['mean'] == (1 + 0.5 + 0 + 1) / 4
  assert found['win_rate_gold']['mean'] == (1 + 0.5 + 1 + 1) / 4
  assert set(found) == {f'{lc}win_rate_{j}' for lc in ('', 'lc_') for j in ('score', 'gold')}


def test_comparison_with_itself_is_even_and_without_a_score_has_none():
  one = _sampled(None, [1.0, 3], ['long', 's'])
  found = evaluate.win_rates(one, one, 0)
  assert set(found) == {'win_rate_gold', 'lc_win_rate_gold'}
  assert found['win_rate_gold']['mean'] == 0.5
  assert found['lc_win_rate_gold']['mean'] == pytest.approx(0.5, abs=1e-9)


def test_figures_of_what_was_sampled():
  # 0 1 0 1 0 1 <stop>, finished: 4-grams 0101 1010 0101; the stop token is no content.
  experience = _experience([[0, 1, 0, 1, 0, 1, 2]], [[0] * 7], [[1] * 7], [True])
  experience = jax.device_get(experience)
  found = evaluate._figures(
    EvaluatedResponses(experience, np.ones(1), np.zeros(1, int), [''], ['a'], None)
  )
  assert found['repeated_4grams'] == pytest.approx(1 / 3)
  assert (found['length'], found['distinct_1']) == (7.0, pytest.approx(1 / 3))
  assert found['score']['mean'] == 1 and found['kl_nats'] == 0
