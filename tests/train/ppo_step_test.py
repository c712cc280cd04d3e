import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import tiny

from segjax.train.experience import make_experience, score
from segjax.train.ppo_step import policy_objective, ppo_step
from segjax.types import Normalizer

from . import setting
from .compiles import compiled

ROWS = np.array([[6, 0, 5, 3], [7, 1, 2, 4], [0, 1, 2, 3]])


@pytest.fixture(scope='module', params=[False, True], ids=['decode_logprob', 'recomputed'])
def experience(request):
  mesh, recipe = tiny.mesh(1), setting.recipe(recompute_logprob=request.param)
  params = {name: setting.network(name, mesh) for name in setting.SEEDS}
  rollout = setting.sample(params['policy'])
  scored = score(params, rollout, recipe=recipe)
  found, metrics = make_experience(
    rollout, scored, jax.tree.map(jnp.float32, Normalizer()), recipe=recipe
  )
  return recipe, found, jax.device_get(metrics)


def step(states, experience, rows):
  *states, metrics = ppo_step(
    *states, experience, rows, recipe=setting.recipe(), total_steps=setting.TOTAL
  )
  return states, jax.device_get(metrics)


def fresh():
  return [setting.state('policy'), setting.state('critic')]


def test_first_minibatch_is_on_policy(experience):
  """Before any update the policy is the one that sampled, and the reference."""
  recipe, found, made = experience
  _, metrics = step(fresh(), found, ROWS[0])
  # The decode loop sums in another order than the full forward: float32. Recomputed, it is the
  # same forward, but for the height of the matrix products.
  limit = 1e-6 if recipe.recompute_logprob else 1e-4
  assert metrics['policy/ratio_max_deviation'] <= limit
  assert made['kl_token_max'] <= limit
  assert metrics['policy/clip_fraction'] == 0
  assert metrics['policy/ratio_mean'] == pytest.approx(1, abs=limit)
  assert metrics['bad'] == 0


def test_later_minibatches_are_off_policy(experience, caplog):
  _, found, _ = experience
  states, deviation = fresh(), []
  with compiled(caplog) as names:
    for rows in ROWS:
      states, metrics = step(states, found, rows)
      deviation.append(metrics['policy/ratio_max_deviation'])
  assert names.count('ppo_step') <= 1
  assert deviation[0] < 1e-3 < min(deviation[1:])
  assert [int(state.step) for state in states] == [3, 3]


def test_policy_follows_the_advantages(experience):
  """After a step on the same rows the surrogate is better and the values are nearer."""
  _, found, _ = experience
  states, before = step(fresh(), found, ROWS[0])
  _, after = step(states, found, ROWS[0])
  assert after['policy/loss'] < before['policy/loss'] - 1e-3
  assert after['value/loss'] < before['value/loss']


def test_minibatch_is_its_rows(experience):
  """The step's loss is the objective of those rows and of no others."""
  recipe, found, _ = experience
  _, metrics = step(fresh(), found, ROWS[0])
  rows = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[ROWS[0]]), found)
  loss, _ = jax.jit(policy_objective, static_argnums=2)(tiny.params(tiny.CONFIG), rows, recipe)
  assert metrics['policy/loss'] == pytest.approx(float(loss), abs=1e-5)  # float32, near 0


def test_bad_critic_does_not_stop_the_policy(experience):
  _, found, _ = experience
  states = fresh()
  head = states[1].params['scalar_head']
  head['kernel'] = head['kernel'].at[0].set(np.nan)
  before = setting.copied(states[1])
  states, metrics = step(states, found, ROWS[0])
  assert metrics['bad'] == 1
  assert [int(state.step) for state in states] == [1, 0]
  jax.tree.map(np.testing.assert_array_equal, setting.copied(states[1]), before)


def test_states_are_donated(experience):
  _, found, _ = experience
  states = fresh()
  leaves = jax.tree.leaves(states)
  step(states, found, ROWS[0])
  assert all(leaf.is_deleted() for leaf in leaves)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(found))
