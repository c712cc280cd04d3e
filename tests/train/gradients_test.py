"""Gradients of the objectives through a whole network, against finite differences in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from jax.flatten_util import ravel_pytree

from segjax.model import heads
from segjax.rl.losses import policy_loss, value_loss

CONFIG = dataclasses.replace(models.CONFIG, dtype='float64')
ROWS, PROMPT, RESPONSE = 3, 3, 5
STEP = 1e-5  # of the differences, whose error is about its square

POLICY = {
  'plain': {},
  'per token': {'mean': 'token'},
  'asymmetric and dual clip': {'clip_eps': 0.1, 'clip_eps_high': 0.3, 'dual_clip': 1.5},
  'micro-batch': {'count': 7.0},
}
VALUE = {
  'plain': {'value_clip_eps': 0.2},
  'no clip, per token': {'value_clip_eps': None, 'mean': 'token'},
  'micro-batch': {'value_clip_eps': 0.5, 'count': 7.0},
}


def cases(options, default):
  """Returns the parameters of a test; all but the default ones are marked as campaign."""
  return [
    pytest.param(value, id=name, marks=() if name == default else pytest.mark.campaign)
    for name, value in options.items()
  ]


def tokens_and_mask():
  """Returns (ids, mask) of ragged responses, one of them empty."""
  length = np.array([RESPONSE, 0, RESPONSE - 2])
  ids = models.ids(seed=41, shape=(ROWS, PROMPT + RESPONSE))
  return jnp.asarray(ids), jnp.asarray(np.arange(RESPONSE) < length[:, None])


def network(head):
  """Returns (flat float64 parameters, their inverse mapping, random directions)."""
  params = models.params(CONFIG, head)
  params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
  flat, restore = ravel_pytree(params)
  directions = np.random.default_rng(42).normal(size=(4, flat.size))
  return flat, restore, jnp.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def assert_gradient(objective, flat, directions):
  """Compares ∇f · d with (f(x + h d) − f(x − h d)) / 2h for each d; returns the metrics at x."""
  value_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (_, metrics), gradient = value_and_grad(flat)
  assert gradient.dtype == jnp.float64
  assert jnp.linalg.norm(gradient) > 1e-3
  for direction in directions:
    (above, _), _ = value_and_grad(flat + STEP * direction)
    (below, _), _ = value_and_grad(flat - STEP * direction)
    slope = (above - below) / (2 * STEP)
    np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-6, atol=1e-9)
  return metrics


def with_array_count(options):
  """Returns the options with `count` as an array, as the losses take it."""
  return {k: jnp.array(v) if k == 'count' else v for k, v in options.items()}


@pytest.mark.campaign
@pytest.mark.parametrize('options', cases(POLICY, 'asymmetric and dual clip'))
def test_policy(options):
  with jax.enable_x64(True):
    flat, restore, directions = network('language')
    ids, mask = tokens_and_mask()
    rng = np.random.default_rng(43)
    noise, advantage = jnp.asarray(rng.normal(size=(2, ROWS, RESPONSE)))

    def logprobs(flat):
      return heads.token_logprobs(restore(flat), ids, CONFIG)[0][:, PROMPT:]

    # Ratios lie on either side of every clip, none of them at a kink.
    old_logprob = logprobs(flat) + 0.4 * noise

    def objective(flat):
      return policy_loss(logprobs(flat), old_logprob, advantage, mask, **with_array_count(options))

    metrics = assert_gradient(objective, flat, directions)
    fractions = [value for name, value in metrics.items() if name.endswith('clipfrac')]
    assert all(0 < fraction < 1 for fraction in fractions)


@pytest.mark.parametrize('options', cases(VALUE, 'plain'))
def test_value(options):
  with jax.enable_x64(True):
    flat, restore, directions = network('scalar')
    ids, mask = tokens_and_mask()
    rng = np.random.default_rng(44)
    noise, return_ = jnp.asarray(rng.normal(size=(2, ROWS, RESPONSE)))

    def values(flat):
      return heads.values(restore(flat), ids, CONFIG)[:, PROMPT:]

    old_value = values(flat) + 0.4 * noise

    def objective(flat):
      return value_loss(values(flat), old_value, return_, mask, **with_array_count(options))

    metrics = assert_gradient(objective, flat, directions)
    is_clipped = options['value_clip_eps'] is not None
    assert (metrics['clipfrac'] > 0) == is_clipped
