import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.pair_metrics import preference_metrics

# Eighths are exact in float32, ties are frequent, and no confidence falls on a boundary of bins.
SCORES = arrays(np.int8, (2, 12), elements=st.integers(-24, 24)).map(lambda x: x / np.float32(8))
LENGTHS = arrays(np.int32, (2, 12), elements=st.integers(0, 3))

run = jax.jit(preference_metrics)


@given(scores=SCORES, lengths=LENGTHS)
def test_equals_oracle(scores, lengths):
  got = jax.device_get(run(*scores, *lengths))
  expected = oracle.preference_metrics(*scores.tolist(), *lengths.tolist())
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_worked():
  """Differences ln 3, -ln 3, ln 9 and 0: the winner is foretold with .75, .25, .9 and .5."""
  chosen = jnp.log(jnp.array([3, 1, 9, 2.0]))
  rejected = jnp.log(jnp.array([1, 3, 1, 2.0]))
  # .75 and .9 are edges of bins: a nudge puts the first two together.
  got = preference_metrics(
    chosen + jnp.array([0.01, 0, 0.01, 0]),
    rejected + jnp.array([0, 0.01, 0, 0]),
    jnp.array([5, 5, 2, 3]),
    jnp.array([3, 6, 1, 3]),
  )
  assert got['accuracy'] == 2.5 / 4
  assert_allclose(got['margin'], (np.log(9) + 0.01) / 4, rtol=1e-5)
  assert got['length_baseline_accuracy'] == 2.5 / 4
  assert_allclose(got['loss'], -np.log([0.75, 0.25, 0.9, 0.5]).mean(), atol=3e-3)
  # Two at confidence .75, one of them right; one at .9, right; the tie is as sure as it is right.
  assert_allclose(got['ece'], (2 * 0.25 + 0.1) / 4, atol=3e-3)


def test_certain_and_right_is_calibrated():
  far, length = jnp.full(3, 1e4), jnp.ones(3, int)
  got = preference_metrics(far, -far, length, length)
  assert got['ece'] == got['loss'] == 0
  assert got['accuracy'] == 1 and got['length_baseline_accuracy'] == 0.5
  got = preference_metrics(-far, far, length, length)
  assert got['ece'] == 1 and got['loss'] == 2e4 and got['accuracy'] == 0


def test_no_pairs_and_half_precision():
  nothing, no_length = jnp.zeros(0), jnp.zeros(0, int)
  assert all(
    value == 0 for value in preference_metrics(nothing, nothing, no_length, no_length).values()
  )
  half, length = jnp.ones(2, jnp.bfloat16), jnp.ones(2, int)
  metrics = preference_metrics(half, half, length, length)
  assert all(value.dtype == jnp.float32 for value in metrics.values())


def test_wrong_arrays_raise():
  scores, lengths = jnp.zeros(3), jnp.zeros(3, int)
  for bad in ([scores, scores[:2], lengths, lengths], [scores, scores, scores, lengths]):
    with pytest.raises(TypeCheckError):
      preference_metrics(*bad)
