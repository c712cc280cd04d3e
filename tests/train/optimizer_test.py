"""The optimizer by hand, its schedule, skipped updates, bfloat16 states."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_allclose

from segjax.config.settings import Optimizer
from segjax.model import sharding
from segjax.train.optimizer import (
  apply_update,
  init_state,
  make_schedule,
  stochastic_round,
  warmup_steps,
)

SETTINGS = Optimizer(
  learning_rate=0.1,
  warmup_ratio=0.25,
  min_lr_ratio=0.1,
  weight_decay=0.01,
  decayed_weights='all',
  max_grad_norm=2.0,
)
TOTAL = 8


@pytest.fixture
def weight_rule(monkeypatch):
  """Adds a sharding rule for a parameter `weight`, which no network has."""
  rules = ((r'weight$', sharding.P(None)), *sharding.PARAMETER_RULES)
  monkeypatch.setattr(sharding, 'PARAMETER_RULES', rules)


def learning_rate(count):
  """Returns the rate: linear over two updates, then half a cosine to a tenth of the peak."""
  if count < 2:
    return 0.1 * count / 2
  return 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (count - 2) / 6)))


def test_adamw_by_hand(weight_rule):
  rng = np.random.default_rng(0)
  weight = rng.normal(size=5)
  grads = rng.normal(size=(TOTAL, 5)) * np.array([[0.1], [5], [1], [1], [9], [1], [1], [1]])
  state = init_state({'weight': jnp.asarray(weight, jnp.float32)}, SETTINGS, TOTAL)
  update = jax.jit(functools.partial(apply_update, settings=SETTINGS, total_steps=TOTAL))
  first, second = np.zeros(5), np.zeros(5)
  for count, grad in enumerate(grads):
    state, metrics = update(state, {'weight': jnp.asarray(grad, jnp.float32)}, jnp.float32(1))
    norm = np.linalg.norm(grad)
    assert_allclose(metrics.mean['grad_norm'], norm, rtol=1e-6)  # before clipping
    clipped = grad * min(1, 2.0 / norm)
    first = 0.9 * first + 0.1 * clipped
    second = 0.95 * second + 0.05 * clipped**2
    corrected = first / (1 - 0.9 ** (count + 1)), second / (1 - 0.95 ** (count + 1))
    step = corrected[0] / (np.sqrt(corrected[1]) + 1e-8) + 0.01 * weight
    weight = weight - learning_rate(count) * step
    assert_allclose(state.params['weight'], weight, rtol=1e-5, atol=1e-6)  # float32
  assert int(state.step) == TOTAL


@pytest.mark.parametrize(
  'decayed, expected',
  [('kernels', {'kernel'}), ('matrices', {'kernel', 'embedding'}), ('all', None)],
)
def test_weight_decay_spares(decayed, expected):
  """At a gradient of 0 exactly the decayed weights change."""
  settings = dataclasses.replace(SETTINGS, warmup_ratio=0.0, decayed_weights=decayed)
  params = models.params(models.TIED)
  before = jax.tree.map(np.asarray, params)

  @jax.jit
  def update(params):
    grads = jax.tree.map(jnp.zeros_like, params)
    state = init_state(params, settings, TOTAL)
    return apply_update(state, grads, jnp.float32(1), settings, TOTAL)[0]

  state = update(params)
  changed, kept = set(), set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    old = functools.reduce(lambda tree, key: tree[key.key], path, before)
    (changed if np.any(leaf != old) else kept).add(path[-1].key)
  assert not changed & kept
  assert changed | kept == {'kernel', 'embedding', 'scale', 'bias'}
  assert changed == (expected or changed | kept)


def test_norm_of_0_does_not_clip(weight_rule):
  """0 turns a limit off, as elsewhere; scaled to norm 0, no gradient would be left."""
  params, grad = {'weight': jnp.zeros(3)}, {'weight': jnp.asarray([1e-3, 2e3, -5.0])}
  moved = {}
  for limit in (0.0, 1e9):
    settings = Optimizer(learning_rate=0.1, warmup_ratio=0.0, max_grad_norm=limit, epsilon=1.0)
    state = init_state(params, settings, TOTAL)
    moved[limit] = apply_update(state, grad, jnp.float32(1), settings, TOTAL)[0].params['weight']
  assert np.all(moved[0.0] != 0)
  np.testing.assert_array_equal(moved[0.0], moved[1e9])


@pytest.mark.parametrize(
  ('loss', 'grad'), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (1.0, -np.inf)]
)
def test_update_that_is_not_finite_is_skipped(weight_rule, loss, grad):
  state = init_state({'weight': jnp.ones(3)}, SETTINGS, TOTAL)
  update = jax.jit(functools.partial(apply_update, settings=SETTINGS, total_steps=TOTAL))
  grads = {'weight': jnp.ones(3)}
  state, metrics = update(state, grads, jnp.float32(1))
  assert int(metrics.sum['skipped_updates']) == 0
  unchanged, metrics = update(state, {'weight': grads['weight'].at[1].set(grad)}, jnp.float32(loss))
  assert int(metrics.sum['skipped_updates']) == 1
  jax.tree.map(np.testing.assert_array_equal, unchanged, state)


@pytest.mark.parametrize(
  'more, learning_rate',
  [({'enabled': jnp.bool(False)}, 1e-3), ({}, 1e30)],
  ids=['not enabled', 'weights overflow'],
)
def test_skipped_update_changes_nothing(more, learning_rate, weight_rule):
  """Moments, count and schedule stay, so a later step is the same as without the skipped one."""
  settings = dataclasses.replace(SETTINGS, learning_rate=learning_rate, warmup_ratio=0.0)
  update = jax.jit(functools.partial(apply_update, settings=settings, total_steps=TOTAL))
  state = init_state({'weight': jnp.ones(3)}, settings, TOTAL)
  unchanged, metrics = update(state, {'weight': jnp.ones(3)}, jnp.float32(1), **more)
  assert int(metrics.sum['skipped_updates']) == 1
  jax.tree.map(np.testing.assert_array_equal, unchanged, state)


@pytest.mark.parametrize(
  ('ratio', 'total', 'expected'), [(0.0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.1, 1, 1)]
)
def test_warmup_rounds_up(ratio, total, expected):
  assert warmup_steps(Optimizer(warmup_ratio=ratio), total) == expected


# 29 updates of warm-up out of 950.
PUBLISHED = Optimizer(learning_rate=5e-7, warmup_ratio=0.03, min_lr_ratio=0.1)


@pytest.mark.parametrize(
  ('step', 'rate'), [(0, 0), (1, 1.72414e-8), (29, 5e-7), (475, 2.861241e-7), (950, 5e-8)]
)
def test_schedule_worked_example(step, rate):
  assert_allclose(make_schedule(PUBLISHED, 950)(step), rate, rtol=2e-6)  # as printed


def test_schedule_golden_file(shared_files):
  for case in json.loads((shared_files / 'spec' / 'golden.json').read_text())['lr']:
    assert warmup_steps(PUBLISHED, case['total']) == case['warm']
    got = make_schedule(PUBLISHED, case['total'])(case['step'])
    # optax counts down from the peak: rounding of the peak remains in a small first rate.
    assert_allclose(got, case['lr'], rtol=1e-6, atol=1e-7 * PUBLISHED.learning_rate)


def test_schedule_rises_falls_and_stays():
  settings = Optimizer(learning_rate=2.0, warmup_ratio=0.1, min_lr_ratio=0.25)
  rates = np.asarray(jax.jit(jax.vmap(make_schedule(settings, 100)))(jnp.arange(121)))
  assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:101]) < 0).all()
  # Halfway down: 0.5 + 1.5 * (1 + cos(pi / 2)) / 2.
  assert_allclose(rates[55], 1.25, rtol=1e-6)
  assert_allclose(rates[100:], 0.5, rtol=1e-6)


@pytest.mark.parametrize(('ratio', 'first'), [(0.0, 1), (1.0, 0)])
def test_schedule_without_warmup_and_of_warmup_alone(ratio, first):
  settings = Optimizer(learning_rate=1.0, warmup_ratio=ratio)
  rate = make_schedule(settings, 5)
  assert rate(0) == first
  assert rate(5) == (1 if ratio else pytest.approx(settings.min_lr_ratio))


def test_moments_in_bfloat16(weight_rule):
  """The updates equal those of float32 up to the rounding of the moments."""
  narrow = dataclasses.replace(SETTINGS, moments_dtype='bfloat16')
  weights = {}
  for settings in (SETTINGS, narrow):
    state = init_state({'weight': jnp.ones(64)}, settings, TOTAL)
    update = jax.jit(functools.partial(apply_update, settings=settings, total_steps=TOTAL))
    for seed in range(TOTAL):
      grads = {'weight': jax.random.normal(jax.random.key(seed), (64,))}
      state, _ = update(state, grads, jnp.float32(1))
    weights[settings.moments_dtype] = np.asarray(state.params['weight'])
    kinds = {str(x.dtype) for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert kinds == {settings.moments_dtype}
  moved = np.abs(weights['float32'] - 1).max()
  assert moved > 0.1
  assert_allclose(weights['bfloat16'], weights['float32'], atol=0.02 * moved)


def test_stochastic_rounding_has_the_right_mean():
  x = jnp.asarray([1 + 2**-9, -3.1, 1e-30, 0.0, np.inf, -np.inf, np.nan, 1.0])
  keys = jax.random.split(jax.random.key(0), 4096)
  drawn = np.asarray(jax.vmap(lambda key: stochastic_round(key, x))(keys), np.float64)
  below = np.asarray(x.astype(jnp.bfloat16), np.float64)
  gap = np.abs(np.asarray(x, np.float64)) * 2**-7
  for index in (0, 1, 2):
    assert len(set(drawn[:, index])) == 2
    # Of 4096 coins: five standard errors of at most half a gap.
    assert abs(drawn[:, index].mean() - float(x[index])) < 5 * 0.5 * gap[index] / 64
  np.testing.assert_array_equal(drawn[:, 3:], np.broadcast_to(below[3:], (4096, 5)))


def test_networks_and_runs_round_apart(weight_rule):
  """Policy and critic rounded equal backbones by the same random bits, in every run."""
  settings = Optimizer(learning_rate=2**-7 / 10, warmup_ratio=0.0, min_lr_ratio=1.0)
  update = jax.jit(functools.partial(apply_update, settings=settings, total_steps=100))

  def moved(key):
    state = init_state({'weight': jnp.ones(4096, jnp.bfloat16)}, settings, 100, key)
    state, _ = update(state, {'weight': jnp.full(4096, -1, jnp.bfloat16)}, jnp.float32(1))
    return np.asarray(state.params['weight']) != 1

  keys = jax.random.split(jax.random.key(0))
  one, other = moved(keys[0]), moved(keys[1])
  np.testing.assert_array_equal(one, moved(keys[0]))
  # A tenth moves in each, a hundredth in both.
  assert (one & other).mean() == pytest.approx(one.mean() * other.mean(), abs=0.01)
  assert one.mean() == pytest.approx(0.1, abs=0.03)


def test_small_steps_of_bfloat16_weights_add_up(weight_rule):
  """Each is a hundredth of an ulp; rounded to the nearest, no weight would change."""
  settings = Optimizer(learning_rate=2**-7 / 100, warmup_ratio=0.0, min_lr_ratio=1.0)
  state = init_state({'weight': jnp.ones(4096, jnp.bfloat16)}, settings, 100)
  update = jax.jit(functools.partial(apply_update, settings=settings, total_steps=100))
  for _ in range(50):
    state, _ = update(state, {'weight': jnp.full(4096, -1, jnp.bfloat16)}, jnp.float32(1))
  assert state.params['weight'].dtype == jnp.bfloat16
  assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state) if x.ndim} == {'float32'}
  moved = np.asarray(state.params['weight'], np.float64).mean() - 1
  assert moved == pytest.approx(50 * settings.learning_rate, rel=0.1)
