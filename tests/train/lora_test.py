"""Training of adapters: what is scored, what is updated, and that nothing else is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import adapters, models, training

from segjax.data.packing_plan import plan_packing
from segjax.model import lora, sharding
from segjax.train.experience import make_experience
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import Minibatch, ppo_step
from segjax.train.recipe import PPORecipe, RewardSource
from segjax.train.rollout_scoring import score
from segjax.types import Normalizer

NAMES = ('policy', 'reference', 'reward', 'critic')
HEADS = {
  name: {'scalar_head': models.params(models.CONFIG, 'scalar', training.SEEDS[name])['scalar_head']}
  for name in ('reward', 'critic')
}


def recipe(**values):
  """Returns the recipe of four networks on one base, of which the reference has no adapter.

  The policy has a head of its own to the vocabulary.
  """
  with_adapter, policy = adapters.config(), adapters.config(adapters.HEADED)
  networks = (policy, models.CONFIG, adapters.config(adapters.SOME), with_adapter)
  values = {
    'recompute_logprob': True,
    'one_base': NAMES,
    'shaping': training.RewardShaping(),
  } | values
  return PPORecipe(
    *networks,
    segmenter=training.segmenter(),
    spread='even_split',
    ppo=training.PPO_SETTINGS,
    **values,
  )


def trained(make, mesh):
  """Returns what is trained of policy, critic and reward model; `make` makes the adapters."""
  base = models.params(models.CONFIG)
  trees = {
    'policy': make(base, adapters.HEADED, 1),
    'critic': make(base, seed=2) | HEADS['critic'],
    'reward': make(base, adapters.SOME, 3) | HEADS['reward'],
  }
  return models.place(base, mesh), {k: models.place(tree, mesh) for k, tree in trees.items()}


@functools.cache
def rollout():
  return training.sample(training.network('policy', models.mesh(1)))


def test_a_policy_without_a_head_of_its_own_has_its_bases():
  base = models.params(models.CONFIG)
  own = base | adapters.adapter(base)
  tuned = base | adapters.adapter(base, adapters.HEADED, 1)
  names = recipe()
  passed = names.own_params({'reference': tuned, 'policy': own})
  assert passed['reference'] is tuned and 'backbone' not in passed['policy']
  policy = names.with_base('policy', passed)
  assert policy['lm_head'] is base['lm_head'] and policy['adapter'] is own['adapter']


def scored(base, trees, recipe):
  """Returns the outputs of all networks over the rollout."""
  params = {'reference': base} | {name: base | tree for name, tree in trees.items()}
  collected = rollout()
  return score(params, collected.arrays, collected.length, recipe=recipe)


@pytest.mark.campaign
def test_before_any_update_the_policy_is_the_reference_bit_for_bit():
  base, trees = trained(adapters.fresh, models.mesh(1))
  outputs = scored(base, trees, recipe())
  mask = np.asarray(rollout().arrays.response_mask)
  ours, theirs = np.asarray(outputs.old_logprob), np.asarray(outputs.ref_logprob)
  np.testing.assert_array_equal(ours[mask], theirs[mask])
  experience, metrics = make_experience(
    rollout().arrays,
    outputs,
    jax.tree.map(jnp.float32, Normalizer()),
    0.1,
    recipe=recipe(),
  )
  assert float(metrics['objective/kl']) == 0
  states = {
    name: init_state(trees[name], training.OPTIMIZER, training.TOTAL)
    for name in ('policy', 'critic')
  }
  _, update = ppo_step(
    states,
    {'policy': base, 'critic': base},
    Minibatch(experience, np.arange(models.BATCH)),
    0.1,
    recipe=recipe(),
    total_steps=training.TOTAL,
  )
  assert float(update.flat()['policy/ratio_max_deviation']) < 1e-5


def test_one_pass_scores_as_networks_by_themselves():
  base, trees = trained(adapters.adapter, models.mesh(1))
  own = adapters.adapter(models.params(models.CONFIG), adapters.SOME, 4)
  trees['reward_lm'] = models.place(own, models.mesh(1))
  second = adapters.adapter(models.params(models.CONFIG), seed=5) | HEADS['critic']
  trees['reward.second'] = models.place(second, models.mesh(1))
  config = adapters.config(adapters.SOME)
  source = RewardSource(
    'second', 'reward.second', adapters.config(), training.segmenter(), 'even_split', 0.5
  )
  values = {'reward_lm': config, 'rewards': (source,)}
  one_base = (*NAMES, 'reward_lm', 'reward.second')
  assert len(recipe(**values, one_base=one_base).groups(one_base)) == 1
  together = scored(base, trees, recipe(**values, one_base=one_base))
  alone = scored(base, trees, recipe(**values, one_base=()))
  assert together.scores.keys() == {'second'}
  mask = np.asarray(rollout().arrays.response_mask)
  for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    at = mask if ours.ndim == 2 else slice(None)
    np.testing.assert_allclose(np.asarray(ours)[at], np.asarray(theirs)[at], rtol=0, atol=3e-5)


def updated(devices=1, micro_batch=0, packed=False):
  """Returns (trained parameters after an update, the base before and after, the metrics)."""
  mesh = models.mesh(devices)
  with jax.set_mesh(mesh):
    base, trees = trained(adapters.adapter, mesh)
    before = training.copied(base)
    one, their = trained(adapters.adapter, models.mesh(1))
    with jax.set_mesh(models.mesh(1)):
      outputs = scored(one, their, recipe())
      normalizer = jax.tree.map(jnp.float32, Normalizer())
      experience, _ = make_experience(rollout().arrays, outputs, normalizer, 0.1, recipe=recipe())
    experience = sharding.place_batch(jax.device_get(experience), mesh)
    settings = dataclasses.replace(training.PPO_SETTINGS, micro_batch_size=micro_batch)
    plan = None
    if packed:
      plan = plan_packing(rollout().length, micro_batch, training.PROMPT + training.RESPONSE + 16)
    states = {
      name: init_state(trees[name], training.OPTIMIZER, training.TOTAL)
      for name in ('policy', 'critic')
    }
    states, metrics = ppo_step(
      states,
      {'policy': base, 'critic': base},
      Minibatch(experience, np.arange(models.BATCH), plan),
      0.1,
      recipe=dataclasses.replace(recipe(), ppo=settings),
      total_steps=training.TOTAL,
    )
    params = {name: training.copied(state.params) for name, state in states.items()}
    return params, (before, training.copied(base)), jax.device_get(metrics.flat())


@functools.cache
def whole_batch():
  return updated()


@pytest.mark.campaign
def test_an_update_moves_adapters_and_head_alone():
  params, (before, after), _ = whole_batch()
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert set(params['policy']) == {lora.ADAPTER, lora.LM_HEAD}
  assert set(params['critic']) == {lora.ADAPTER, lora.HEAD}
  _, trees = trained(adapters.adapter, models.mesh(1))
  for name in ('policy', 'critic'):
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params[name], dict(trees[name]))
    assert min(jax.tree.leaves(moved)) > 1e-5, moved


@pytest.mark.parametrize(
  'values',
  [
    pytest.param({'micro_batch': 2}, marks=pytest.mark.campaign),
    pytest.param({'micro_batch': 2, 'packed': True}, marks=pytest.mark.campaign),
    pytest.param({'devices': 8}, marks=pytest.mark.devices),
    pytest.param({'devices': 8, 'micro_batch': 4, 'packed': True}, marks=pytest.mark.devices),
  ],
  ids=['accumulated', 'packed', 'devices', 'packed-devices'],
)
def test_pieces_and_devices_update_as_the_whole_batch(values):
  expected, _, metrics = whole_batch()
  params, _, others = updated(**values)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5),
    params,
    expected,
  )
  for name in ('policy/loss', 'critic/loss', 'policy/grad_norm', 'critic/grad_norm'):
    np.testing.assert_allclose(others[name], metrics[name], rtol=2e-3, atol=1e-6, err_msg=name)
