import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl.kl import ESTIMATORS, adaptive_kl_coef, k1, k2, k3


def test_worked_estimates():
  # π/π_ref = 2, so k1 = ln 2, k2 = ½ ln² 2, k3 = ½ − 1 + ln 2.
  logprob, ref_logprob = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
  assert_allclose(k1(logprob, ref_logprob), [0.693147], atol=1e-6)
  assert_allclose(k2(logprob, ref_logprob), [0.240227], atol=1e-6)
  assert_allclose(k3(logprob, ref_logprob), [0.193147], atol=1e-6)


def test_k1_golden():
  logprob = jnp.array([-1, -2, -0.5, -3, -0.1])
  ref_logprob = jnp.array([-1.2, -1.5, -0.5, -4, -0.3])
  assert_allclose(k1(logprob, ref_logprob), [0.2, -0.5, 0, 1, 0.2], atol=1e-6)


@pytest.mark.parametrize('name', ['k1', 'k3'])
def test_unbiased(name):
  """The mean over the policy's own tokens is the KL, exactly."""
  rng = np.random.default_rng(0)
  policy, reference = rng.dirichlet(np.ones(6), size=2)
  estimate = ESTIMATORS[name](jnp.log(jnp.asarray(policy)), jnp.log(jnp.asarray(reference)))
  expected = np.sum(policy * np.log(policy / reference))
  assert_allclose(np.sum(policy * np.asarray(estimate)), expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['k2', 'k3'])
def test_never_negative(name):
  logprob = jnp.linspace(-5, -0.1, 9)
  assert jnp.all(ESTIMATORS[name](logprob, logprob[::-1]) >= 0)
  assert_allclose(ESTIMATORS[name](logprob, logprob), np.zeros(9))


@pytest.mark.parametrize('name', ESTIMATORS)
def test_finite_at_any_log_ratio(name):
  logprob, ref_logprob = jnp.array([0.0, -1e3, -100.0]), jnp.array([-1e3, 0.0, 0.0])
  value, grad = jax.value_and_grad(lambda x: jnp.sum(ESTIMATORS[name](x, ref_logprob)))(logprob)
  assert np.isfinite(value) and np.all(np.isfinite(grad))
  # e^20 - 21: sums and squares of it are finite too.
  assert_allclose(k3(logprob, ref_logprob), [19.0, np.exp(20) - 21, np.exp(20) - 21], rtol=1e-6)


def test_precision():
  half = jnp.zeros(2, jnp.bfloat16)
  assert {estimate(half, half).dtype for estimate in ESTIMATORS.values()} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  ('kl', 'expected'), [(0.02, 0.0097952), (0.2, 0.0102048), (0.1, 0.01), (0.105, 0.0100512)]
)
def test_adaptive_coef_golden(kl, expected):
  assert_allclose(adaptive_kl_coef(0.01, kl, 0.1, 1024), expected, rtol=1e-6)
  assert_allclose(adaptive_kl_coef(jnp.array(0.01), jnp.array(kl), 0.1, 1024), expected, rtol=1e-6)


def test_wrong_arrays_raise():
  for estimate in ESTIMATORS.values():
    with pytest.raises(TypeCheckError):
      estimate(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(TypeCheckError):
      estimate(jnp.zeros(3, int), jnp.zeros(3))
