import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.responses import LENGTH
from fixtures.strategies import numbers, responses
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.aggregation import AGGREGATIONS, sequence_score
from segjax.rl.segmentation import segment

# Segments end at 1, 2, 4; the stop token at 5 is in none.
ENTROPY, MASK = jnp.array([9, 0, 9, 9, 0, 9.0]), jnp.ones(6, bool)
SCORE = jnp.array([jnp.nan, 0.2, 0.4, jnp.nan, 0.6, jnp.nan])
SEGMENTS = segment(ENTROPY, MASK, jnp.array(True))
_VALUES = np.array([0.2, 0.4, 0.6])
_WEIGHTS = np.exp(_VALUES) / np.sum(np.exp(_VALUES))
_SOFT = _WEIGHTS @ _VALUES


@pytest.mark.parametrize(
  ('aggregation', 'score', 'gradient'),
  [
    ('mean', 0.4, [1 / 3, 1 / 3, 1 / 3]),
    ('sum', 1.2, [1, 1, 1]),
    ('min', 0.2, [1, 0, 0]),
    ('max', 0.6, [0, 0, 1]),
    ('last', 0.6, [0, 0, 1]),
    # d/ds_j of Σ w s with w = softmax(s) is w_j (1 + s_j − Σ w s).
    ('softmax', _SOFT, _WEIGHTS * (1 + _VALUES - _SOFT)),
  ],
)
def test_worked(aggregation, score, gradient):
  got, slope = jax.value_and_grad(sequence_score)(SCORE, SEGMENTS, aggregation)
  assert_allclose(got, score, rtol=1e-6)
  assert_allclose(slope, np.insert(gradient, [0, 2, 3], 0), rtol=1e-6)


def test_temperature():
  score = functools.partial(sequence_score, SCORE, SEGMENTS, 'softmax')
  assert_allclose(score(temperature=1e-4), 0.6, rtol=1e-6)
  assert_allclose(score(temperature=1e4), 0.4, rtol=1e-4)
  # exp of these scores themselves would overflow.
  far = jnp.where(jnp.isnan(SCORE), SCORE, 1e4 * SCORE)
  assert_allclose(sequence_score(far, SEGMENTS, 'softmax'), 6000)


@jax.jit
def scores_and_slopes(entropy, mask, finished, score, temperature):
  segments = segment(entropy, mask, finished)

  def one(score, name):
    return sequence_score(score, segments, name, temperature=temperature)

  return segments.end, {name: jax.value_and_grad(one)(score, name) for name in AGGREGATIONS}


@given(response=responses(), score=numbers(), temperature=st.sampled_from([0.01, 0.5, 1.0, 100.0]))
def test_equals_oracle(response, score, temperature):
  entropy_after, entropy, mask, finished = response
  ends = oracle.segment_ends(entropy_after.tolist(), mask.tolist(), bool(finished), 'segment', 2.0)
  corrupted = np.where(np.isin(np.arange(LENGTH), ends), score, np.nan).astype(np.float32)
  got = scores_and_slopes(entropy, mask, finished, corrupted, temperature)
  end, scores = jax.device_get(got)
  for name, (value, slope) in scores.items():
    expected = oracle.sequence_score(score[ends].tolist(), name, temperature)
    assert_allclose(value, expected, atol=1e-5)
    # Nothing leaks in from under the mask, and equal shifts of all scores shift the result.
    assert np.all(np.isfinite(slope)) and not slope[~end].any()
    shift = len(ends) if name == 'sum' else float(bool(ends))
    assert_allclose(slope.sum(), shift, atol=1e-3)


def test_precision():
  for name in AGGREGATIONS:
    assert sequence_score(SCORE.astype(jnp.bfloat16), SEGMENTS, name).dtype == jnp.float32
    with jax.enable_x64(True):
      assert sequence_score(SCORE.astype(jnp.float64), SEGMENTS, name).dtype == jnp.float64


def test_unknown_aggregation_lists_the_valid_ones():
  with pytest.raises(ValueError, match=r"'median'.*mean.*sum.*min.*max.*last.*softmax"):
    sequence_score(SCORE, SEGMENTS, 'median')


def test_wrong_arrays_raise():
  with pytest.raises(TypeCheckError):
    sequence_score(jnp.zeros(6, int), SEGMENTS)
  with pytest.raises(TypeCheckError):
    sequence_score(jnp.zeros((2, 6)), SEGMENTS)
