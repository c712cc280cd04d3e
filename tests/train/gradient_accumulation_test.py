"""Gradients accumulated over pieces equal those of the full batch."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from fixtures.compiles import compiled
from numpy.testing import assert_allclose

from segjax.config.settings import SFT
from segjax.model import sharding
from segjax.model.heads import token_logprobs
from segjax.rl.masked import masked_mean, masked_sum
from segjax.train import gradient_accumulation
from segjax.train.metrics import Metrics


def objective(params, batch, counts, config, *, slots=None):
  """A clipped surrogate by sequence and a cross-entropy by token, over counts of the batch."""
  logprob, entropy = token_logprobs(params, batch['ids'], config)
  mask = batch['mask']
  # Divided by 10, for the old log-probs are drawn at random, far from these.
  ratio = jnp.exp(jnp.where(mask, logprob - batch['old_logprob'], 0) / 10)
  surrogate = jnp.minimum(ratio * batch['advantage'], jnp.clip(ratio, 0.8, 1.2))
  loss = -jnp.sum(masked_mean(surrogate, mask, axis=1)) / counts['sequences']
  loss -= masked_sum(logprob, mask) / counts['tokens']
  return loss, Metrics(
    mean={'loss': loss, 'entropy': masked_sum(entropy, mask) / counts['tokens']},
    max={
      'ratio': jnp.max(jnp.where(mask, ratio, -jnp.inf)),
      'entropy': jnp.max(jnp.where(mask, entropy, 0.0)),
    },
    sum={'clipped': jnp.sum(jnp.where(mask, jnp.abs(ratio - 1) > 0.2, False))},
  )


def data(rows=models.BATCH, dtype=np.float32):
  """Returns ragged responses; rows 1 and 5 are empty, and masked values are NaN."""
  rng = np.random.default_rng(0)
  length = rng.integers(1, models.LENGTH - 4, rows)
  length[1::4] = 0
  position = np.arange(models.LENGTH)
  mask = (position > 3) & (position < 4 + length[:, None])
  old_logprob = np.where(mask, rng.normal(-5, 1, mask.shape), np.nan).astype(dtype)
  advantage = rng.normal(size=mask.shape).astype(dtype)
  names = ('ids', 'mask', 'old_logprob', 'advantage')
  values = (models.ids(shape=mask.shape), mask, old_logprob, advantage)
  return dict(zip(names, values, strict=True))


def network(mesh=None):
  return models.place(models.params(models.CONFIG), mesh or models.mesh(1))


def count_terms(batch):
  mask = batch['mask']
  terms = {'sequences': jnp.any(mask, axis=1), 'tokens': mask}
  return {name: jnp.sum(x).astype(batch['advantage'].dtype) for name, x in terms.items()}


@functools.partial(jax.jit, static_argnames=('pieces', 'config'))
def run(params, batch, pieces, config=models.CONFIG):
  loss_fn = functools.partial(objective, config=config)
  micro_batch = len(batch['ids']) // pieces
  return gradient_accumulation.value_and_grad(
    loss_fn, params, batch, micro_batch, None, count_terms(batch)
  )


@functools.cache
def accumulated(pieces, devices=1):
  mesh = models.mesh(devices)
  with jax.set_mesh(mesh):
    params = network(mesh)
    return run(params, sharding.place_batch(data(), mesh), pieces)


def assert_same(got, expected, rtol, grad_rtol):
  """Compares the metrics, and the gradients as one vector, to `grad_rtol` of their norm."""
  (loss, metrics), grads = jax.device_get(got)
  (expected_loss, expected_metrics), expected_grads = jax.device_get(expected)
  assert_allclose(loss, expected_loss, rtol=rtol)
  for path, value in jax.tree_util.tree_leaves_with_path(expected_metrics):
    got_value = dict(jax.tree_util.tree_leaves_with_path(metrics))[path]
    assert_allclose(got_value, value, rtol=rtol, err_msg=str(path))
    assert got_value.dtype == value.dtype
  difference = jax.tree.leaves(jax.tree.map(np.subtract, grads, expected_grads))
  norm = [np.sqrt(sum(np.sum(x**2) for x in v)) for v in (difference, jax.tree.leaves(grads))]
  assert norm[0] <= grad_rtol * norm[1]


@pytest.mark.parametrize(
  'pieces', [2, *(pytest.param(n, marks=pytest.mark.campaign) for n in (4, 8))]
)
def test_pieces_equal_the_full_batch(pieces):
  # float32: the network sums in another order for another number of rows.
  assert_same(accumulated(pieces), accumulated(1), 1e-6, 5e-6)


@pytest.mark.campaign
def test_pieces_equal_the_full_batch_in_float64():
  with jax.enable_x64(True):
    config = dataclasses.replace(models.CONFIG, dtype='float64')
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), models.params(models.CONFIG))
    batch = data(dtype=np.float64)
    results = [run(params, batch, pieces, config) for pieces in (1, 4)]
    assert {x.dtype for x in jax.tree.leaves(results[1][1])} == {jnp.dtype('float64')}
    assert_same(*results, 1e-12, 1e-12)


@pytest.mark.compiled
def test_one_program_for_all_pieces(caplog):
  params, batch = network(), data()
  accumulated(4)
  with compiled(caplog) as names:
    run(params, jax.tree.map(jnp.asarray, batch | {'ids': batch['ids'][::-1].copy()}), 4)
    sizes = {n: run.lower(params, batch, n).as_text().count('dot_general') for n in (1, 2, 4, 8)}
  assert names.count('run') <= 1
  assert len(set(sizes.values())) == 1, sizes


def test_bfloat16_is_added_up_in_float32():
  """255 terms of 2⁻⁹ after a 1, which bfloat16 would lose one by one."""
  params = {'scalar_head': {'kernel': jnp.ones((1, 1), jnp.bfloat16)}}
  batch = np.full((256, 1), 2.0**-9, np.float32)
  batch[0] = 1

  def linear(params, batch, *, slots):
    loss = jnp.sum(batch @ params['scalar_head']['kernel'].astype(jnp.float32))
    return loss, Metrics()

  (loss, _), grads = gradient_accumulation.value_and_grad(
    linear, params, jnp.asarray(batch), 1, None
  )
  grad = grads['scalar_head']['kernel']
  assert (loss.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
  assert float(loss) == 1 + 255 / 512
  assert float(grad[0, 0]) == 1.5  # 1.498, rounded once


@pytest.mark.devices
def test_eight_devices_equal_one():
  assert_same(accumulated(2, devices=8), accumulated(1), 1e-6, 5e-6)  # float32
  layout = jax.tree.map(lambda x: x.sharding, network(models.mesh(8)))
  for path, grad in jax.tree_util.tree_leaves_with_path(accumulated(2, devices=8)[1]):
    expected = functools.reduce(lambda tree, key: tree[key.key], path, layout)
    assert grad.sharding.is_equivalent_to(expected, grad.ndim), path


def communication(rows, pieces):
  """Returns (counts of collectives by shape and kind, warnings of the partitioner)."""
  mesh = models.mesh(8)
  with jax.set_mesh(mesh), models.captured_stderr() as lines:
    batch = sharding.place_batch(data(rows), mesh)
    text = run.lower(network(mesh), batch, pieces).compile().as_text()
  kinds = 'all-gather|all-to-all|collective-permute'
  sent = re.findall(rf'= \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(', text)
  return collections.Counter(sent), models.rematerialisations(lines)


@pytest.mark.compiled
def test_no_row_leaves_its_device():
  """Two pieces of 4 rows send what one batch of 4 rows sends: weights."""
  sent, warnings = communication(rows=8, pieces=2)
  expected, _ = communication(rows=4, pieces=1)
  assert expected['f32[32,32]', 'all-gather'] == 2  # a piece of the head, forward and backward
  assert sent == expected
  assert warnings == []


@pytest.mark.compiled
def test_activations_of_one_piece_at_a_time():
  params, batch = network(), data(rows=16)
  memory = {
    n: run.lower(params, batch, n).compile().memory_analysis().temp_size_in_bytes for n in (1, 4)
  }
  assert memory[4] < 0.5 * memory[1], memory


@pytest.mark.devices
def test_rows_by_tokens():
  """The largest divisor of the batch that fits, and divides over the devices that split rows."""
  settings = SFT(micro_batch_tokens=100)

  def rows(batch, tokens, settings=settings):
    return gradient_accumulation.rows_at_once(settings, batch, tokens)

  assert [rows(12, tokens) for tokens in (8, 9, 16, 17, 50, 100, 101)] == [12, 6, 6, 4, 2, 1, 1]
  assert rows(12, 8, SFT(micro_batch_size=3)) == 3
  with jax.set_mesh(models.mesh(8)):  # four of them split rows, two each share one
    assert [rows(24, tokens) for tokens in (33, 34, 66, 67, 200)] == [24, 12, 12, 8, 4]


@pytest.mark.parametrize(
  ('micro_batch', 'message'),
  [
    (3, r'micro_batch=3 does not divide the 8 rows of the batch; use 1, 2, 4, 8\.'),
    (16, 'micro_batch=16 does not divide the 8 rows'),
  ],
)
def test_micro_batches_that_do_not_divide(micro_batch, message):
  with pytest.raises(ValueError, match=message):
    gradient_accumulation.value_and_grad(
      objective, {}, {'ids': jnp.zeros((8, 2))}, micro_batch, None
    )


def test_arrays_of_different_rows():
  batch = {'ids': jnp.zeros((8, 2)), 'mask': jnp.zeros((4, 2))}
  with pytest.raises(ValueError, match=r'have \[4, 8\] rows; all must have the same'):
    gradient_accumulation.value_and_grad(objective, {}, batch, 2, None)
