"""The step on pairs and labels of steps together, against the two losses written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from numpy.testing import assert_allclose

from segjax.data import packing_plan
from segjax.model import sharding
from segjax.model.heads import scores
from segjax.rl import oracle_step_labels
from segjax.train.mixed_step import UNPACKED, MixedBatch, MixedPacking, mixed_step
from segjax.train.optimizer import apply_update
from segjax.train.preference_step import FrozenParams, preference_step
from train.preference_step_test import expected_scores

WEIGHT = 0.5
COUNT = (~np.isnan(training.labelled_steps().label)).sum()
SETTINGS = dataclasses.replace(training.REWARD, steps_weight=WEIGHT)


@pytest.fixture(scope='module')
def networks():
  mesh = models.mesh(1)
  return {name: training.network(name, mesh) for name in ('reward', 'reference')}


def batch():
  steps = sharding.place_batch(training.labelled_steps(), models.mesh(1))
  return MixedBatch(training.pairs(), steps)


def step(networks, settings=SETTINGS, packing=UNPACKED):
  """Returns the parameters after one update of the state, and its metrics."""
  state, metrics = mixed_step(
    training.state('reward'),
    FrozenParams(networks['reference']),
    batch(),
    packing,
    scorer=training.SCORER,
    settings=settings,
    total_steps=training.TOTAL,
  )
  return training.copied(state.params), jax.device_get(metrics)


def assert_same_update(got, expected):
  """The updates of every tensor are within 1e-4 of their norm."""
  start = training.copied(training.state('reward').params)
  for new, ours, old in zip(*map(jax.tree.leaves, (expected, got, start)), strict=True):
    assert np.linalg.norm(ours - new) <= 1e-4 * np.linalg.norm(new - old) > 0


def test_the_loss_of_each_part(networks):
  _, metrics = step(networks)
  score = expected_scores(networks, 'segment')
  assert_allclose(metrics['loss'], np.mean(np.log1p(np.exp(score[:, 1] - score[:, 0]))), rtol=1e-5)
  ids, label = training.labelled_steps()
  listed = [[None if np.isnan(y) else float(y) for y in row] for row in label]
  of_tokens = np.asarray(models.scores(networks['reward'], ids, models.CONFIG), np.float64)
  expected = oracle_step_labels.step_label_loss(of_tokens.tolist(), listed, COUNT)
  assert_allclose(metrics['step_loss'], expected, rtol=1e-5)
  is_right = (of_tokens > 0) == (label > 0.5)
  assert_allclose(metrics['step_accuracy'], is_right[~np.isnan(label)].mean(), rtol=1e-6)


@pytest.mark.campaign
def test_the_update_descends_the_weighted_sum(networks):
  params, metrics = step(networks)
  pairs, steps = batch()

  def total(params):
    both, _ = training.SCORER.score_pairs(params, networks['reference'], pairs)
    logit = scores(params, steps.ids, models.CONFIG)
    terms = jax.nn.softplus(logit) - jnp.nan_to_num(steps.label) * logit
    mean = jnp.sum(jnp.where(jnp.isnan(steps.label), 0, terms)) / COUNT
    return jnp.mean(jax.nn.softplus(both[:, 1] - both[:, 0])) + WEIGHT * mean

  state = training.state('reward')
  loss, grads = jax.jit(jax.value_and_grad(total))(state.params)
  assert_allclose(metrics['loss'] + WEIGHT * metrics['step_loss'], loss, rtol=1e-5)
  update = functools.partial(apply_update, settings=SETTINGS.optimizer, total_steps=training.TOTAL)
  after, _ = jax.jit(update)(state, grads, loss)
  assert_same_update(params, training.copied(after.params))


@pytest.mark.campaign
def test_without_weight_it_is_the_step_on_pairs(networks):
  settings = dataclasses.replace(training.REWARD, steps_weight=0.0)
  params, metrics = step(networks, settings)
  state, alone = preference_step(
    training.state('reward'),
    FrozenParams(networks['reference']),
    training.pairs(),
    scorer=training.SCORER,
    settings=settings,
    total_steps=training.TOTAL,
  )
  assert_same_update(params, training.copied(state.params))
  for name, value in jax.device_get(alone).items():
    assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  assert metrics['step_loss'] > 0


@pytest.mark.campaign
@pytest.mark.parametrize('is_packed', [False, True])
def test_pieces_change_nothing(networks, is_packed):
  expected, whole = step(networks)
  packing, settings = UNPACKED, dataclasses.replace(SETTINGS, micro_batch_size=2)
  if is_packed:
    lengths = np.full(models.BATCH, models.LENGTH)
    plan = functools.partial(packing_plan.plan_packing, rows=4, width=2 * models.LENGTH)
    packing = MixedPacking(plan(np.repeat(lengths, 2), group=2), plan(lengths))
  params, metrics = step(networks, settings, packing)
  assert_same_update(params, expected)
  for name in ('loss', 'accuracy', 'step_loss', 'step_accuracy', 'grad_norm'):
    assert_allclose(metrics[name], whole[name], rtol=1e-5, err_msg=name)
