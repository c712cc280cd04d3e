"""Packed rows give the losses and updates of padded ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.compiles import compiled
from numpy.testing import assert_allclose, assert_array_equal

from segjax.data.packing_plan import PieceBound, plan_level_packing, plan_packing
from segjax.model import heads, packed, sharding
from segjax.rl.learned_tokens import high_entropy_tokens
from segjax.train.experience import make_experience
from segjax.train.implicit_scoring import ImplicitScorer
from segjax.train.ppo_step import Minibatch, critic_step, policy_step
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.rollout_scoring import score
from segjax.train.sft_step import sft_step
from segjax.types import Normalizer

WIDTH = 32  # of a packed row: the longest sequences have 24 tokens
NORMALIZER = jax.tree.map(jnp.float32, Normalizer(0.2, -0.1, 0.3, 0.8))


@pytest.mark.parametrize('function', [heads.token_logprobs, heads.scores, heads.values])
def test_packed_outputs_equal_padded_ones(function):
  head = 'language' if function is heads.token_logprobs else 'scalar'
  params, ids = models.params(models.CONFIG, head), jnp.asarray(models.ids())
  length = np.array([24, 1, 5, 8, 13, 20, 17, 0])
  plan = plan_packing(length, 8, WIDTH)
  slots = jax.tree.map(lambda x: jnp.asarray(x[0]), plan.pieces)
  assert plan.count == 1
  run_network = jax.jit(functools.partial(packed.run_packed, function, config=models.CONFIG))
  result = run_network(params, ids=ids[slots.sequence], slots=slots)
  for got, expected in zip(
    jax.tree.leaves(result), jax.tree.leaves(run_network(params, ids=ids)), strict=True
  ):
    for index, sequence in enumerate(slots.sequence):
      n = length[sequence]
      assert_allclose(got[index, :n], expected[sequence, :n], atol=2e-5)  # float32


@functools.cache
def ppo_experience():
  """Returns (experience, tokens of each prompt with its response); half of them are learned."""
  mesh = models.mesh(1)
  ppo = dataclasses.replace(training.PPO_SETTINGS, learn_on='high_ref_entropy', learn_share=0.5)
  with jax.set_mesh(mesh):
    recipe = training.recipe(ppo=ppo)
    params = {name: training.network(name, mesh) for name in training.SEEDS}
    rollout = training.sample(params['policy'], mesh)
    outputs = score(params, rollout.arrays, rollout.length, recipe=recipe)
    experience, metrics = make_experience(
      rollout.arrays, outputs, NORMALIZER, np.float32(0.1), recipe=recipe
    )
  mask = rollout.response_mask
  assert_array_equal(
    experience.learn_mask, high_entropy_tokens(experience.ref_entropy, jnp.asarray(mask), 0.5)
  )
  assert_allclose(metrics['policy/learned_share'], experience.learn_mask.sum() / mask.sum())
  return experience, rollout.length


def level_plan(lengths, group=1, devices=1):
  """Returns a plan by tokens: two level pieces on one device, one on eight."""
  return plan_level_packing(lengths, PieceBound(devices, 64 + 32 * group, WIDTH), group)


def run(step, name, packed, mean='sequence', devices=1):
  """Returns (parameters after an update, metrics), without packing, packed or level."""
  mesh = models.mesh(devices)
  rows = 8 if devices == 8 else 2
  plan = functools.partial(plan_packing, rows=rows, width=WIDTH)
  if packed == 'level':
    plan = functools.partial(level_plan, devices=devices)
  with jax.set_mesh(mesh):
    if name == 'sft':
      batch = training.conversations(mesh)
      length = np.array([24, 9, 20, 3, 14, 24, 7, 11])
      mask = np.asarray(batch.mask) & (np.arange(models.LENGTH) < length[:, None])
      batch = batch._replace(mask=sharding.place_batch(mask, mesh))
      settings = dataclasses.replace(training.FINE_TUNING, micro_batch_size=rows if packed else 0)
      state, metrics = sft_step(
        *(training.state('policy', mesh), batch, plan(length) if packed else None),
        config=models.CONFIG,
        settings=settings,
        total_steps=training.TOTAL,
      )
    elif name in ('reward', 'dpo'):
      pairs = training.pairs(mesh)
      ends = [
        models.LENGTH - np.argmax(np.asarray(side.response_mask)[:, ::-1], axis=1)
        for side in (pairs.chosen, pairs.rejected)
      ]
      has = [np.asarray(side.response_mask).any(axis=1) for side in (pairs.chosen, pairs.rejected)]
      length = np.where(np.stack(has, 1), np.stack(ends, 1), 1).reshape(-1)
      settings = dataclasses.replace(training.REWARD, micro_batch_size=rows if packed else 0)
      scorer = ImplicitScorer(models.CONFIG, models.CONFIG, 0.1) if name == 'dpo' else None
      state, metrics = preference_step(
        training.state('policy' if name == 'dpo' else 'reward', mesh),
        FrozenParams(training.network('reference', mesh)),
        pairs,
        plan(length, group=2) if packed else None,
        scorer=scorer or training.SCORER,
        settings=settings,
        total_steps=training.TOTAL,
      )
    else:
      experience, lengths = ppo_experience()
      experience = sharding.place_batch(jax.device_get(experience), mesh)
      order = np.array([6, 0, 5, 3, 1, 2, 4, 7])
      ppo = dataclasses.replace(
        training.PPO_SETTINGS, loss_aggregation=mean, micro_batch_size=rows if packed else 0
      )
      minibatch = Minibatch(experience, order, plan(lengths[order]) if packed else None)
      kl_coef = (np.float32(0.1),) if name == 'policy' else ()
      state, metrics = step(
        training.state(name, mesh),
        minibatch,
        *kl_coef,
        recipe=training.recipe(ppo=ppo),
        total_steps=training.TOTAL,
      )
      metrics = metrics.flat()
  return training.copied(state.params), jax.device_get(metrics)


CASES = [
  (policy_step, 'policy', 'sequence', 1, 'fixed'),
  pytest.param(policy_step, 'policy', 'sequence', 8, 'level', marks=pytest.mark.devices),
  pytest.param(policy_step, 'policy', 'token', 1, 'fixed', marks=pytest.mark.campaign),
  pytest.param(critic_step, 'critic', 'sequence', 1, 'level', marks=pytest.mark.campaign),
  pytest.param(sft_step, 'sft', 'token', 1, 'level', marks=pytest.mark.campaign),
  pytest.param(preference_step, 'reward', 'sequence', 1, 'level', marks=pytest.mark.campaign),
  pytest.param(preference_step, 'dpo', 'sequence', 1, 'level', marks=pytest.mark.campaign),
  pytest.param(preference_step, 'reward', 'sequence', 8, 'fixed', marks=pytest.mark.devices),
  pytest.param(preference_step, 'reward', 'sequence', 8, 'level', marks=pytest.mark.devices),
]


@pytest.mark.parametrize(
  ('step', 'name', 'mean', 'devices', 'packed'), CASES, ids=lambda x: '' if callable(x) else str(x)
)
def test_packed_step_equals_padded(step, name, mean, devices, packed):
  expected, expected_metrics = run(step, name, '', mean)
  parameters, metrics = run(step, name, packed, mean, devices)
  for key, value in expected_metrics.items():
    assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-5, err_msg=key)  # float32
  difference = jax.tree.map(np.subtract, parameters, expected)
  before = training.copied(training.state('policy' if name in ('sft', 'dpo') else name).params)
  moved = jax.tree.map(np.subtract, expected, before)
  norms = [
    np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree))) for tree in (difference, moved)
  ]
  assert norms[0] < 1e-3 * norms[1]


@pytest.mark.campaign
def test_other_lengths_compile_nothing(caplog):
  run(critic_step, 'critic', 'fixed')
  experience, lengths = ppo_experience()
  static = {
    'recipe': training.recipe(ppo=dataclasses.replace(training.PPO_SETTINGS, micro_batch_size=2)),
    'total_steps': training.TOTAL,
  }
  counts = []
  with jax.set_mesh(models.mesh(1)), compiled(caplog) as names:
    for rows in (np.full(8, int(lengths.argmin())), np.full(8, int(lengths.argmax()))):
      plan = plan_packing(lengths[rows], 2, WIDTH)
      counts.append(int(plan.count))
      critic_step(training.state('critic'), Minibatch(experience, rows, plan), **static)
  assert counts[0] < counts[1]
  assert names.count('critic_step') <= 1


def test_level_plans_of_the_cases():
  """Several pieces on one device, one on eight: a loop and a program without one."""
  lengths = np.array([24, 9, 20, 3, 14, 24, 7, 11])
  assert [level_plan(lengths, devices=n).num_pieces for n in (1, 8)] == [2, 1]
