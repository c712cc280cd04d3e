"""Filters against sorting, and samples against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_allclose

from segjax.model.sampling import (
  Sampling,
  filter_logits,
  has_no_finite_logit,
  inverse_cdf,
  sample_token,
)


def oracle_filter(logits, temperature, top_k, top_p):
  """Probabilities after temperature, top-k and nucleus, by sorting."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-logits, kind='stable')
  top = order[: top_k or len(order)]
  probs = np.exp(logits[top] - logits.max())
  probs /= probs.sum()
  enough = np.searchsorted(np.cumsum(probs), top_p - 1e-9) + 1 if top_p < 1 else len(probs)
  result = np.zeros(len(logits))
  result[top[:enough]] = probs[:enough] / probs[:enough].sum()
  return result


@pytest.mark.parametrize(
  ('top_k', 'top_p'),
  [(0, 1.0), (1, 1.0), (5, 1.0), (200, 1.0), (0, 0.05), (0, 0.6), (0, 0.999), (20, 0.7), (3, 0.99)],
)
def test_filter_equals_sorting(top_k, top_p):
  scale = np.repeat([0.1, 1.0, 4.0, 12.0], 16)[:, None]
  logits = scale * np.random.default_rng(0).normal(size=(64, models.VOCAB))
  logits[::3, 5:9] = -np.inf  # banned
  logits = logits.astype(np.float32)
  sampling = Sampling(top_k=top_k, top_p=top_p)
  got = jax.nn.softmax(jax.jit(filter_logits, static_argnums=1)(logits, sampling), axis=-1)
  expected = np.stack([oracle_filter(row, 1.0, top_k, top_p) for row in logits])
  np.testing.assert_array_equal(np.asarray(got) > 1e-12, expected > 1e-12)
  assert_allclose(got, expected, atol=1e-5)  # float32


def test_filter_keeps_ties():
  """Equal logits at the edge are all kept."""
  logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
  passes = jnp.isfinite(filter_logits(logits, Sampling(top_k=2)))
  assert passes.tolist() == [[True, True, True, False, False]]
  passes = jnp.isfinite(filter_logits(logits, Sampling(top_p=0.5)))
  assert passes.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize('size', [1, 5, 128, 129, 300])
def test_inverse_cdf_equals_a_running_sum(size):
  rng = np.random.default_rng(size)
  weights = rng.random((64, size)) * (rng.random((64, size)) < 0.5)
  weights[:, rng.integers(size)] += 0.1
  uniform = rng.random(64)
  uniform[:2] = 0, 1 - 2**-24
  weights, uniform = weights.astype(np.float32), uniform.astype(np.float32)
  got = np.asarray(jax.jit(inverse_cdf)(weights, uniform))
  running = np.cumsum(weights.astype(np.float64), axis=1)
  expected = np.argmax(running > (uniform * running[:, -1])[:, None], axis=1)
  # Sums in float32: a neighbour is right if the target is within rounding of the edge.
  near = np.abs(running - (uniform * running[:, -1])[:, None]).min(axis=1) < 1e-5 * running[:, -1]
  assert (got == expected)[~near].all()
  assert (weights[np.arange(64), got] > 0).all()


def test_inverse_cdf_skips_weights_of_0_where_running_sums_rise():
  """A sum in a tree may rise over blocks of weight 0; a target in the rise drew from such a block.

  A nucleus of 60 tokens out of Llama-3's vocabulary, and the uniform numbers next to each rise.
  """
  rng, rows, size = np.random.default_rng(0), 16, 128_256
  weights = np.zeros((rows, size), np.float32)
  for row in weights:
    row[rng.choice(size, 60, replace=False)] = np.exp(-6 * rng.random(60))
  sums = weights.reshape(rows, -1, 128).sum(-1)
  above = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(sums))
  steps = np.arange(-3, 4)
  draw = jax.jit(inverse_cdf)
  rises = np.argwhere((above[:, 1:] > above[:, :-1]) & (sums[:, 1:] == 0))
  assert len(rises)
  for row, block in rises[::8]:
    uniform = ((above[row, block] / above[row, -1] * 2**23).astype(int) + steps) * 2.0**-23
    token = draw(np.repeat(weights[row : row + 1], len(steps), axis=0), uniform.astype(np.float32))
    assert (weights[row, token] > 0).all()


@pytest.mark.parametrize('index', [0, 127, 128, 299])
def test_inverse_cdf_of_a_single_weight(index):
  weights = np.zeros((4, 300), np.float32)
  weights[:, index] = 1
  uniform = np.array([0, 0.5, 1 - 2**-23, 1 - 2**-24], np.float32)
  assert jax.jit(inverse_cdf)(weights, uniform).tolist() == [index] * 4


def test_both_logprobs_are_of_their_own_distribution():
  rng = np.random.default_rng(1)
  logits = rng.normal(scale=3, size=(32, models.VOCAB)).astype(np.float32)
  sampling = Sampling(temperature=0.7, top_k=9, min_new_tokens=4)
  stop = jnp.array(models.STOP_IDS)
  count = jnp.asarray(np.arange(32) % 8)
  sampled = jax.jit(sample_token, static_argnums=4)(
    logits, rng.random(32).astype(np.float32), count, stop, sampling
  )
  for row, token in enumerate(np.asarray(sampled.token)):
    plain = logits[row] - np.logaddexp.reduce(logits[row])
    banned = logits[row].copy()
    if count[row] < 4:
      banned[list(models.STOP_IDS)] = -np.inf
    expected = np.log(oracle_filter(banned, 0.7, 9, 1.0)[token])
    assert_allclose(sampled.logprob[row], plain[token], atol=1e-5)
    assert_allclose(sampled.sample_logprob[row], expected, atol=1e-5)


def test_rows_without_a_finite_logit():
  logits = np.zeros((4, 5), np.float32)
  logits[0, 2], logits[1], logits[2, :4] = np.nan, -np.inf, -np.inf
  assert has_no_finite_logit(jnp.asarray(logits)).tolist() == [True, True, False, False]
