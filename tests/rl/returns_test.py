import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl.returns import gae, returns

from .ragged import make_batch, padded


@jax.jit
@jax.vmap
def advantage_and_return(reward, value, mask, gamma, gae_lambda):
  advantage = gae(reward, value, mask, gamma=gamma, gae_lambda=gae_lambda)
  return advantage, returns(advantage, value, mask)


def test_worked_example():
  # Backwards: A_4 = -.002 - .1 = -.102; A_3 = .99 + .1 - .5 + .95 (-.102) = .4931; ...
  reward = jnp.array([0.248, -0.095, 0.4, 0.99, -0.002, 0])
  value = jnp.array([0.3, 0.2, -0.1, 0.5, 0.1, 0])
  mask = jnp.array([True] * 5 + [False])
  advantage = gae(reward, value, mask)
  assert_allclose(advantage, [1.098022, 1.000023, 1.468445, 0.4931, -0.102, 0], atol=1e-6)
  expected = [1.398022, 1.200023, 1.368445, 0.9931, -0.002, 0]
  assert_allclose(returns(advantage, value, mask), expected, atol=1e-6)


def test_golden_file(material):
  cases = json.loads((material / 'spec' / 'golden.json').read_text())['gae']
  advantage, return_ = advantage_and_return(
    padded([case['r'] for case in cases]),
    padded([case['V'] for case in cases]),
    # No mask is stored: beyond the response rewards and values are 0 already.
    padded([[1] * len(case['r']) for case in cases], bool),
    jnp.array([case['gamma'] for case in cases]),
    jnp.array([case['lam'] for case in cases]),
  )
  assert_allclose(advantage, padded([case['adv'] for case in cases]), atol=1e-5)
  assert_allclose(return_, padded([case['ret'] for case in cases]), atol=1e-5)


@pytest.mark.parametrize(('gamma', 'gae_lambda'), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0)])
def test_equals_oracle(gamma, gae_lambda):
  batch = make_batch(seed=6)
  spoil = np.where(batch.mask, 0, np.nan).astype(np.float32)
  advantage, return_ = advantage_and_return(
    jnp.asarray(batch.score + spoil),
    jnp.asarray(batch.value + spoil),
    jnp.asarray(batch.mask),
    jnp.full(len(spoil), gamma),
    jnp.full(len(spoil), float(gae_lambda)),
  )
  for row, (reward, value, mask) in enumerate(batch.rows('score', 'value', 'mask')):
    expected = oracle.gae(reward, value, mask, gamma, gae_lambda)
    assert_allclose(advantage[row], expected, atol=1e-5)  # float32
    assert_allclose(return_[row], np.where(mask, np.add(expected, value), 0), atol=1e-5)


def test_lambda_one_telescopes():
  """With γ = λ = 1 the return is the sum of the rewards still to come."""
  reward, value = jax.random.normal(jax.random.key(0), (2, 6))
  mask = jnp.ones(6, bool)
  advantage = gae(reward, value, mask, gae_lambda=1.0)
  to_come = jnp.cumsum(reward[::-1])[::-1]
  assert_allclose(returns(advantage, value, mask), to_come, atol=1e-5)


def test_precision():
  mask = jnp.ones(2, bool)
  half = jnp.ones(2, jnp.bfloat16)
  assert gae(half, half, mask).dtype == returns(half, half, mask).dtype == jnp.float32
  with jax.enable_x64(True):
    double = jnp.ones(2, jnp.float64)
    assert gae(double, double, mask).dtype == jnp.float64


@pytest.mark.parametrize(
  ('reward', 'value', 'mask'),
  [
    (jnp.zeros(3, int), jnp.zeros(3), jnp.ones(3, bool)),
    (jnp.zeros(3), jnp.zeros(2), jnp.ones(3, bool)),
    (jnp.zeros(3), jnp.zeros(3), jnp.ones(3)),
    (jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 3), bool)),
  ],
  ids=['integer reward', 'shorter value', 'mask of floats', 'no vmap'],
)
def test_wrong_arrays_raise(reward, value, mask):
  with pytest.raises(TypeCheckError):
    gae(reward, value, mask)
