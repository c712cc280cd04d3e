import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.platforms import PATHS, jit_by_path
from fixtures.responses import LENGTH
from fixtures.strategies import corrupted, masks
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose

from segjax.rl import oracle_advantages
from segjax.rl.critic_free import (
  ESTIMATORS,
  dr_grpo,
  group_norm,
  leave_one_out,
  reinforce_plus_plus,
)

# Two segments and a stop token; one segment, a stop token, and padding.
MASK = jnp.array([[True, True, True, True], [True, True, False, False]])
START = jnp.array([[True, False, True, False], [True, False, False, False]])
REWARD = jnp.array([[1, 2, 4, -1], [6, 0, jnp.nan, jnp.nan]])
NO_STARTS = jnp.zeros_like(START)


def test_reinforce_plus_plus_worked():
  got = reinforce_plus_plus(REWARD, NO_STARTS, MASK, gamma=0.5)
  # Backwards: -1; 4 - .5; 2 + 1.75; 1 + 1.875.
  assert_allclose(got, [[2.875, 3.75, 3.5, -1], [6, 0, 0, 0]])


def test_leave_one_out_worked():
  got = leave_one_out(REWARD, NO_STARTS, MASK)
  # To go: 6 5 3 -1 and 6 0. The second is over after two tokens, of which the last has 0 to go.
  assert_allclose(got, [[0, 5, 3, -1], [0, -5, 0, 0]])


def test_leave_one_out_of_last_rewards_is_rloo():
  """R = 1, 4, 7 at the last tokens: each less the mean of the two others, at every token."""
  length = np.array([2, 5, 3])
  mask = np.arange(5) < length[:, None]
  reward = np.where(np.arange(5) == length[:, None] - 1, [[1.0], [4.0], [7.0]], 0)
  got = leave_one_out(*map(jnp.asarray, (reward, mask, mask)))
  assert_allclose(got, np.where(mask, [[-4.5], [0.0], [4.5]], 0))


def test_group_norm_worked():
  """Segments earn 3, 3 (its stop token included) and 6: mean 4, variance 2."""
  root = 2**-0.5
  expected = np.array([[-2, -2, -1, -1], [2, 2, 0, 0]]) * root
  assert_allclose(group_norm(REWARD, START, MASK), expected, rtol=1e-6)
  assert_allclose(dr_grpo(REWARD, START, MASK), expected / root, rtol=1e-6)
  # A discount per segment: -1 + .5 (-1).
  assert_allclose(dr_grpo(REWARD, START, MASK, gamma=0.5)[0], [-1.5, -1.5, -1, -1], rtol=1e-6)


def test_group_norm_of_whole_responses_is_grpo():
  """One segment each: (R - mean) / std at every token."""
  reward = jnp.array([[0.0, 1, 0], [0, 0, 3], [2, 0, 0]])
  mask = jnp.array([[True, True, False], [True, True, True], [True, False, False]])
  got = group_norm(reward, jnp.zeros_like(mask), mask)
  expected = np.where(mask, np.array([[-1.0], [1], [0]]) / np.sqrt(2 / 3), 0)
  assert_allclose(got, expected, atol=1e-6)


# Integers, for a variance that is not 0 is then far above rounding errors.
REWARDS = arrays(np.float32, LENGTH, elements=st.integers(-4, 4))


def run(reward, start, mask, gamma):
  return {name: f(reward, start, mask, gamma=gamma) for name, f in ESTIMATORS.items()}


RUN = jit_by_path(run)


@pytest.mark.parametrize('path', PATHS)
@given(gamma=st.sampled_from([1.0, 0.9, 0.0]), rows=st.tuples(*[st.tuples(REWARDS, masks())] * 3))
def test_equals_oracle(path, gamma, rows):
  """Three responses under any masks, with segments anywhere."""
  reward, mask = (np.stack(x) for x in zip(*rows, strict=True))
  start = np.roll(mask, 1, axis=0)
  got = jax.device_get(RUN[path](corrupted(reward, mask), start, mask, gamma))
  rewards, starts, rows = reward.tolist(), start.tolist(), mask.tolist()
  expected = {
    'reinforce_plus_plus': [
      oracle_advantages.return_to_go(*row, gamma) for row in zip(rewards, rows, strict=True)
    ],
    'rloo': oracle_advantages.leave_one_out(rewards, rows, gamma),
    'group_norm': oracle_advantages.group_norm(rewards, starts, rows, gamma),
    'dr_grpo': oracle_advantages.group_norm(rewards, starts, rows, gamma, divides=False),
  }
  assert expected.keys() == ESTIMATORS.keys()
  for name, want in expected.items():
    scale = 1 + np.abs(want).max()
    assert_allclose(got[name] / scale, np.array(want) / scale, atol=2e-4, err_msg=name)


def test_equal_rewards_teach_nothing():
  ones, every = np.ones((3, LENGTH), np.float32), np.ones((3, LENGTH), bool)
  got = RUN['loop'](ones, every, every, 1.0)
  for name in ('rloo', 'group_norm', 'dr_grpo'):
    assert_allclose(got[name], 0, atol=1e-6, err_msg=name)
