import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.platforms import PATHS, jit_by_path
from fixtures.responses import LENGTH, padded
from fixtures.strategies import corrupted, masks, numbers
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle, oracle_advantages
from segjax.rl.advantages import (
  action_starts,
  border_gae,
  gae,
  length_adaptive_lambda,
  macro_gae,
  returns,
)
from segjax.rl.segmentation import segment


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


@pytest.mark.parametrize('path', PATHS)
def test_golden_file(shared_files, path):
  cases = json.loads((shared_files / 'spec' / 'golden.json').read_text())['gae']
  advantage, return_ = jit_by_path(advantage_and_return)[path](
    padded([case['r'] for case in cases]),
    padded([case['V'] for case in cases]),
    # No mask is stored: beyond the response rewards and values are 0 already.
    padded([[1] * len(case['r']) for case in cases], bool),
    jnp.array([case['gamma'] for case in cases]),
    jnp.array([case['lam'] for case in cases]),
  )
  assert_allclose(advantage, padded([case['adv'] for case in cases]), atol=1e-5)
  assert_allclose(return_, padded([case['ret'] for case in cases]), atol=1e-5)


CONSTANTS = st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])


def run(reward, value, mask, start, gamma, gae_lambda):
  options = {'gamma': gamma, 'gae_lambda': gae_lambda}
  advantage = gae(reward, value, mask, **options)
  by_token = macro_gae(reward, value, mask, mask, **options)
  by_action = macro_gae(reward, value, start, mask, **options)
  by_border = border_gae(reward, value, start, mask, **options)
  return advantage, returns(advantage, value, mask), by_token, by_action, by_border


RUN = jit_by_path(run)


@pytest.mark.parametrize('path', PATHS)
@given(constants=CONSTANTS, reward=numbers(), value=numbers(), mask=masks(), start=masks())
def test_equals_oracle(path, constants, reward, value, mask, start):
  """Any mask, so that between the policy's tokens there are others, and any actions."""
  reward, value = np.where(mask, (reward, value), 0)
  got = RUN[path](corrupted(reward, mask), corrupted(value, mask), mask, start, *constants)
  advantage, return_, by_token, by_action, by_border = jax.device_get(got)
  expected = oracle.gae(reward.tolist(), value.tolist(), mask.tolist(), *constants)
  assert_allclose(advantage, expected, atol=1e-4)
  assert_allclose(return_, expected + value, atol=1e-4)
  assert_allclose(by_token, advantage, atol=1e-6)
  expected = oracle.macro_gae(
    reward.tolist(), value.tolist(), start.tolist(), mask.tolist(), *constants
  )
  assert_allclose(by_action, expected, atol=1e-4)
  expected = oracle_advantages.border_gae(
    reward.tolist(), value.tolist(), start.tolist(), mask.tolist(), *constants
  )
  assert_allclose(by_border, expected, atol=1e-4)
  # Others' tokens are passed over: without them nothing changes.
  alone = oracle.gae(reward[mask].tolist(), value[mask].tolist(), [True] * mask.sum(), *constants)
  assert_allclose(advantage[mask], alone, atol=1e-4)


@given(constants=CONSTANTS, reward=numbers(), value=numbers())
def test_oracle_is_the_discounted_sum(constants, reward, value):
  gamma, gae_lambda = constants
  reward, value = reward.tolist(), value.tolist()
  next_value = [*value[1:], 0.0]
  delta = [r + gamma * n - v for r, n, v in zip(reward, next_value, value, strict=True)]
  expected = [
    sum((gamma * gae_lambda) ** k * later for k, later in enumerate(delta[t:]))
    for t in range(LENGTH)
  ]
  got = oracle.gae(reward, value, [True] * LENGTH, gamma, gae_lambda)
  assert_allclose(got, expected, atol=1e-9)


def test_macro_actions_worked():
  """Two tokens, a tool's answer, one token, then the stop token by itself."""
  mask = jnp.array([True, True, False, True, True, False])
  start = jnp.array([True, False, True, True, True, True])
  reward = jnp.array([1, 2, jnp.nan, 4, 0, jnp.nan])
  value = jnp.array([0.5, jnp.nan, jnp.nan, 1, 2, jnp.nan])
  got = macro_gae(reward, value, start, mask, gamma=0.5, gae_lambda=0.5)
  # A_3 = 0 - 2; A_2 = 4 + .5 * 2 - 1 + .25 (-2) = 3.5; A_1 = 3 + .5 * 1 - .5 + .25 * 3.5.
  assert_allclose(got, [3.875, 3.875, 0, 3.5, -2, 0])
  # The first token starts an action, whether it is said or not.
  got = macro_gae(reward, value, start.at[0].set(False), mask, gamma=0.5, gae_lambda=0.5)
  assert_allclose(got, [3.875, 3.875, 0, 3.5, -2, 0])


def test_borders_worked():
  """Two tokens, a tool's answer, one token, then the stop token: borders before the last two."""
  mask = jnp.array([True, True, False, True, True, False])
  start = jnp.array([True, False, True, True, True, True])
  reward = jnp.array([1, 2, jnp.nan, 4, 0, jnp.nan])
  value = jnp.array([0.5, 3, jnp.nan, 1, 2, jnp.nan])
  got = border_gae(reward, value, start, mask, gamma=0.5, gae_lambda=0.5)
  # A_4 = 0 - 2; A_3 = 4 + .5 * 2 - 1 + .25 (-2) = 3.5; A_1 = 2 + .5 * 1 - 3 + .25 * 3.5 = .375;
  # A_0 = 1 + .5 * 3 - .5 + .5 * .375, without λ.
  assert_allclose(got, [2.1875, 0.375, 0, 3.5, -2, 0])
  every = border_gae(reward, value, mask, mask, gamma=0.5, gae_lambda=0.5)
  assert_allclose(every, gae(reward, value, mask, gamma=0.5, gae_lambda=0.5))


@pytest.mark.parametrize(
  'count, factor, expected', [(100, 0.05, 0.8), (10, 0.05, 0.0), (0, 2, 0.5)]
)
def test_lambda_grows_with_the_length(count, factor, expected):
  """1 - 1 / 5; 1 - 1 / .5 is below 0; an empty response counts as one action."""
  assert_allclose(length_adaptive_lambda(jnp.array(count), factor), expected, rtol=1e-6)


@pytest.mark.parametrize(('finished', 'stop_token'), [(True, True), (False, False)])
def test_actions_are_segments_and_the_stop_token(finished, stop_token):
  mask = jnp.array([False, True, True, True, True, False])
  entropy = jnp.array([9, 0, 0, 9, 0, 9.0])
  starts = action_starts(segment(entropy, mask, jnp.array(finished)), mask)
  assert_allclose(starts, [False, True, False, True, stop_token, False])


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
  assert macro_gae(half, half, mask, mask).dtype == jnp.float32
  with jax.enable_x64(True):
    double = jnp.ones(2, jnp.float64)
    assert gae(double, double, mask).dtype == jnp.float64
    assert macro_gae(double, double, mask, mask).dtype == jnp.float64


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
  with pytest.raises(TypeCheckError):
    macro_gae(reward, value, jnp.ones(3, bool), mask)
