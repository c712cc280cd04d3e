import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.strategies import corrupted, masks
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.masked import at_least_float32, masked_mean, masked_sum, whiten


def test_whiten_golden():
  # mean (1+2+3-1+.5)/5 = 1.1; variance (.01+.81+3.61+4.41+.36)/5 = 1.84, rsqrt .7372098.
  x = jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 7.0]])
  mask = jnp.array([[True, True, True], [True, True, False]])
  expected = [[-0.073721, 0.663489, 1.400699], [-1.548141, -0.442326, 0]]
  assert_allclose(whiten(x, mask), expected, atol=1e-6)  # printed to six decimals


# Quarters, so that equal entries have a mean without rounding, which the floor would magnify.
QUARTERS = arrays(np.int8, (3, 8), elements=st.integers(-12, 12)).map(lambda x: x / np.float32(4))
jitted = jax.jit(whiten)


@given(x=QUARTERS, mask=masks((3, 8)))
def test_whiten_equals_oracle(x, mask):
  expected = oracle.whiten(x.tolist(), mask.tolist())
  assert_allclose(jitted(corrupted(x, mask), mask), expected, atol=1e-5)


def test_whiten_of_equal_entries_is_zero():
  assert_allclose(whiten(jnp.full((2, 3), 5.0), jnp.ones((2, 3), bool)), np.zeros((2, 3)))


def test_whiten_does_not_blow_up_noise():
  # The variance 1e-10 is below the floor 1e-8: the entries grow by 1e4, not by 1e5.
  assert_allclose(whiten(jnp.array([[1e-5, -1e-5]]), jnp.ones((1, 2), bool)), [[0.1, -0.1]])


def test_whiten_of_nothing_is_zero():
  x = jnp.full((2, 3), jnp.nan)
  assert_allclose(whiten(x, jnp.zeros((2, 3), bool)), np.zeros((2, 3)))


def test_mean_and_sum_ignore_what_is_masked():
  x = jnp.array([[1.0, jnp.nan], [3.0, 5.0], [jnp.inf, jnp.nan]])
  mask = jnp.array([[True, False], [True, True], [False, False]])
  assert masked_sum(x, mask) == 9
  assert masked_mean(x, mask) == 3
  assert_allclose(masked_mean(x, mask, axis=1), [1, 4, 0])
  assert_allclose(masked_mean(x, mask, axis=(0, 1)), 3)


def test_gradient_ignores_nan_under_the_mask():
  x, mask = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
  assert_allclose(jax.grad(lambda x: masked_mean(x, mask))(x), [1, 0])


def test_precision_is_raised_and_never_lowered():
  assert at_least_float32(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
  # 257 ones: a sum in bfloat16 sticks at 256.
  ones = jnp.ones(257, jnp.bfloat16)
  assert masked_sum(ones, jnp.ones(257, bool)) == 257
  with jax.enable_x64(True):
    double = jnp.zeros((2, 3), jnp.float64)
    assert masked_mean(double, double == 0).dtype == jnp.float64
    assert whiten(double, double == 0).dtype == jnp.float64


@pytest.mark.parametrize(
  ('x', 'mask'),
  [
    (jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)),
    (jnp.zeros((2, 3)), jnp.ones((2, 3))),
    (jnp.zeros((2, 3)), jnp.ones((2, 4), bool)),
  ],
  ids=['integer', 'mask of floats', 'shorter'],
)
def test_wrong_arrays_raise(x, mask):
  for function in (masked_sum, masked_mean, whiten):
    with pytest.raises(TypeCheckError):
      function(x, mask)
