"""A rollout scored in the packed rows of its update."""

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
from segjax.train.experience import make_experience
from segjax.train.ppo_step import Minibatch, policy_step
from segjax.train.recipe import RewardSource
from segjax.train.rollout_scoring import score
from segjax.types import Normalizer

WIDTH = 32  # of a packed row: the longest sequences have 24 tokens
ROWS = np.array([[6, 1, 4, 3], [0, 7, 2, 5]])  # of two minibatches


def level(lengths, devices=1):
  return plan_level_packing(lengths, PieceBound(devices, 96, WIDTH))


def fixed(lengths, devices=1):
  """Two rows of `WIDTH`: as many pieces as are needed, of twice as many that there may be."""
  return plan_packing(lengths, 8 if devices == 8 else 2, WIDTH)


def minibatches(length, plan, devices=1):
  return [(rows, plan(length[rows], devices)) for rows in ROWS]


@functools.cache
def sampled(devices=1):
  mesh = models.mesh(devices)
  with jax.set_mesh(mesh):
    params = {name: training.network(name, mesh) for name in training.SEEDS}
    return params, training.sample(params['policy'], mesh)


def listed_recipe():
  """A recipe with all that `score_chunk` may return, but for attributions."""
  source = RewardSource(
    'other', 'listed reward', models.CONFIG, training.segmenter(), 'even_split', 1.0
  )
  return training.recipe(recompute_logprob=True, rewards=(source,), reward_lm=models.CONFIG)


def scored(plan, recipe, devices=1, length=None):
  params, rollout = sampled(devices)
  length = rollout.length if length is None else length
  params = params | {'reward_lm': params['reference'], 'listed reward': params['reward']}
  with jax.set_mesh(models.mesh(devices)):
    return score(
      params,
      rollout.arrays,
      length,
      recipe=recipe,
      minibatches=plan and minibatches(length, plan, devices),
    )


@pytest.mark.parametrize(
  ('plan', 'devices'),
  [
    (fixed, 1),
    pytest.param(level, 1, marks=pytest.mark.campaign),
    pytest.param(level, 8, marks=pytest.mark.devices),
    pytest.param(fixed, 8, marks=pytest.mark.devices),
  ],
)
def test_packed_scores_equal_those_of_rows(plan, devices):
  recipe, mask = listed_recipe(), sampled()[1].response_mask
  got, expected = jax.device_get((scored(plan, recipe, devices), scored(None, recipe)))
  assert_allclose(got.prompt_score, expected.prompt_score, atol=3e-5)  # float32
  for name in ('old_logprob', 'ref_logprob', 'ref_entropy', 'score', 'value', 'lm_logprob'):
    values = [getattr(outputs, name)[mask] for outputs in (got, expected)]
    assert np.ptp(values[1]) > 0.01, name
    assert_allclose(*values, atol=3e-5, err_msg=name)
  assert_allclose(got.scores['other'][mask], expected.scores['other'][mask], atol=3e-5)
  assert_array_equal(got.old_logprob[~mask], 0)


def half(config):
  return dataclasses.replace(config, dtype='bfloat16', remat='none')


def first_deviation(recipe):
  """Returns the largest |ratio - 1| of the first update, whose rows are packed by `level`."""
  _, rollout = sampled()
  outputs, normalizer = scored(level, recipe), jax.tree.map(jnp.float32, Normalizer())
  with jax.set_mesh(models.mesh(1)):
    experience, _ = make_experience(
      rollout.arrays, outputs, normalizer, jnp.float32(0.1), None, None, recipe=recipe
    )
    rows, packing = minibatches(rollout.length, level)[0]
    _, metrics = policy_step(
      training.state('policy'),
      Minibatch(experience, rows, packing),
      jnp.float32(0.1),
      recipe=recipe,
      total_steps=training.TOTAL,
    )
  return float(metrics.max['ratio_max_deviation'])


@pytest.mark.campaign
def test_first_ratios_are_1_in_bfloat16():
  """The same rows round the same, on any device; on a GPU others do not, by 1 and more."""
  recipe = training.recipe(recompute_logprob=True)
  recipe = dataclasses.replace(recipe, policy=half(recipe.policy), reference=half(recipe.reference))
  assert first_deviation(recipe) == 0


def test_other_lengths_compile_nothing(caplog):
  """How many pieces there are, and which rows they hold, are no part of a program."""
  recipe, (_, rollout) = listed_recipe(), sampled()
  scored(fixed, recipe)
  shorter = rollout.length // 3 + 1
  pieces = [
    sum(plan.num_pieces for _, plan in minibatches(n, fixed)) for n in (rollout.length, shorter)
  ]
  assert pieces[0] > pieces[1]
  with compiled(caplog) as names:
    scored(fixed, recipe, length=shorter)
  assert names == []
