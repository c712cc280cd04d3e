"""The figures of an evaluation."""

import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data.tokenizer import ChatTokenizer
from segjax.jobs import evaluate
from segjax.settings import Evaluate
from segjax.types import Experience, Rollout, Segments


def test_interval_is_that_of_the_prompts_means():
  # Two prompts have the means 1 and 4, whose standard error is (3 / sqrt 2) / sqrt 2 = 1.5.
  found = evaluate.interval(np.array([0.0, 2, 4, 4]), np.array([0, 0, 1, 1]))
  assert found['mean'] == 2.5 and found['n'] == 4
  np.testing.assert_allclose([found['low'], found['high']], [2.5 - 2.94, 2.5 + 2.94], rtol=1e-12)


def test_interval_of_one_prompt_says_nothing():
  assert evaluate.interval(np.array([1.0, 2]), np.array([0, 0]))['low'] is None


def test_functions_are_found_by_name():
  gold, boundary = evaluate.functions(Evaluate(gold='operator:eq', boundary=''))
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
  evaluate.show({'before': figures | {'boundary_f1': 0.96}, 'after': figures})
  out = capsys.readouterr().out
  assert '-0.500 [-0.610, -0.400]' in out
  assert '0.960' in out and '-0.00 ' not in out
  assert max(map(len, out.splitlines())) <= 100
