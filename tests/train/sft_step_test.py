"""The supervised fine-tuning step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.compiles import compiled
from numpy.testing import assert_allclose

from segjax.data.batches import TokenBatch
from segjax.train.sft_step import sft_step, sft_sums


def step(state, ids, mask, settings=training.FINE_TUNING):
  batch = TokenBatch(ids, mask)
  return sft_step(state, batch, config=models.CONFIG, settings=settings, total_steps=training.TOTAL)


def test_learns_one_batch(caplog):
  state, losses = training.state('policy'), []
  ids, mask = training.conversations()
  with compiled(caplog) as names:
    for _ in range(12):
      state, metrics = step(state, ids, mask)
      losses.append(float(metrics['loss']))
      assert int(metrics['skipped_updates']) == 0
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < losses[0] - 0.5
  assert int(state.step) == 12
  assert names.count('sft_step') <= 1  # the shapes never change


def test_loss_is_of_the_masked_tokens():
  ids, mask = training.conversations()
  logprob, entropy = models.token_logprobs(models.params(models.CONFIG), ids, models.CONFIG)
  real = np.asarray(mask).copy()
  real[:, 0] = False  # nothing predicts the first token
  assert np.asarray(mask)[:, 0].any()
  _, metrics = step(training.state('policy'), ids, mask)
  total = -np.sum(np.asarray(logprob)[real])
  assert_allclose(metrics['loss'], total / np.sum(mask), rtol=1e-5)  # float32
  assert_allclose(metrics['entropy'], np.sum(np.asarray(entropy)[real]) / np.sum(mask), rtol=1e-5)


def test_state_is_donated():
  state = training.state('policy')
  leaves = jax.tree.leaves(state)
  step(state, *training.conversations())
  assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.parametrize('value', [np.nan, np.inf], ids=['nan', 'inf'])
def test_non_finite_batch_changes_nothing(value):
  """Token 5 has a corrupted embedding: its batch is skipped, and learned once it is restored."""
  ids, mask = training.conversations()
  assert (ids == 5).any()
  state = training.state('policy')
  embedding = state.params['backbone']['embedding']
  original = jnp.copy(embedding[5])
  state.params['backbone']['embedding'] = embedding.at[5].set(value)
  before = training.copied(state)

  state, metrics = step(state, ids, mask)
  assert int(metrics['skipped_updates']) == 1
  assert not np.isfinite(metrics['grad_norm']) or not np.isfinite(metrics['loss'])
  jax.tree.map(np.testing.assert_array_equal, training.copied(state), before)
  assert int(state.step) == 0

  embedding = state.params['backbone']['embedding']
  state.params['backbone']['embedding'] = embedding.at[5].set(original)
  state, metrics = step(state, ids, mask)
  assert int(metrics['skipped_updates']) == 0
  assert int(state.step) == 1
  moved = np.asarray(state.params['lm_head']['kernel']) - before.params['lm_head']['kernel']
  assert np.linalg.norm(moved) > 0


def test_sums_of_the_rows_that_are_real():
  ids, mask = training.conversations()
  params = models.params(models.CONFIG)
  logprob, entropy = models.token_logprobs(params, ids, models.CONFIG)
  batch = TokenBatch(jnp.asarray(ids), jnp.asarray(mask))
  real = np.asarray(mask)[:3]
  sums = sft_sums(params, batch, np.int32(3), config=models.CONFIG)
  assert sums['tokens'] == real.sum()
  assert_allclose(sums['loss'], -np.sum(np.asarray(logprob)[:3][real]), rtol=1e-5)  # float32
  assert_allclose(sums['entropy'], np.sum(np.asarray(entropy)[:3][real]), rtol=1e-5)
