"""Lookups and their gradients: in float32 sums, and in parts of the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_allclose

from segjax.model import sharding
from segjax.model.embedding import embed


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_gradient_of_a_frequent_token(param_dtype):
  """Token 7 occurs 2,048 times; summed in bfloat16, its gradient was wrong by a tenth."""
  ids = jnp.full((4, 512), 7)
  rng = np.random.default_rng(0)
  cotangent = jnp.asarray(rng.normal(0.3, 1, (4, 512, 64)), jnp.bfloat16)

  @jax.jit
  def grad(table):
    return jax.grad(lambda t: jnp.sum((embed(t, ids, 'bfloat16') * cotangent).astype('float32')))(
      table
    )

  got = np.asarray(grad(jnp.ones((16, 64), param_dtype)), np.float64)
  expected = np.asarray(cotangent, np.float64).sum((0, 1))
  assert not got[np.arange(16) != 7].any()
  error = np.abs(got[7] - expected).mean() / np.abs(expected).mean()
  assert error < (1e-5 if param_dtype == 'float32' else 2e-3)  # one rounding to 8 bits


# Sizes that divide over the axes of the mesh, and sizes whose axes are dropped.
@pytest.mark.parametrize(
  ('vocab', 'rows', 'length'), [(80, 8, 24), (82, 2, 24), (81, 8, 23), (80, 1, 5)]
)
def test_eight_devices_equal_one(vocab, rows, length):
  rng = np.random.default_rng(1)
  table = rng.normal(size=(vocab, 32)).astype(np.float32)
  ids = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  weight = rng.normal(size=(rows, length, 32)).astype(np.float32)

  @jax.jit
  def run(table, ids, weight):
    def loss(table):
      x = embed(table, ids, 'float32')
      return jnp.sum(x * weight), x

    return jax.grad(loss, has_aux=True)(table)

  mesh = models.mesh(8)
  with jax.set_mesh(mesh):
    layout = sharding.parameter_sharding('backbone/embedding', table.shape, mesh)
    grad, x = run(jax.device_put(table, layout), ids, weight)
  np.testing.assert_array_equal(x, table[ids])  # one device's row and zeros: no rounding
  expected = np.zeros_like(table)
  np.add.at(expected, ids, weight)
  assert_allclose(grad, expected, atol=1e-5)
  if rows == 8:  # fewer rows are not split over all devices, and then the table is gathered
    assert grad.sharding.shard_shape(grad.shape) == layout.shard_shape(grad.shape)


@pytest.mark.compiled
def test_neither_table_nor_gradient_crosses_devices():
  """Hidden states of a device's tokens do: 2 x 12 x 32 numbers; the table has 800 x 32."""
  mesh, shape = models.mesh(8), (800, 32)
  layout = sharding.parameter_sharding('backbone/embedding', shape, mesh)

  def loss(table, ids):
    return jnp.sum(embed(table, ids, 'bfloat16').astype(jnp.float32) ** 2)

  table = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
  ids = jax.ShapeDtypeStruct((8, 24), jnp.int32, sharding=sharding.batch_sharding(2, mesh))
  with jax.set_mesh(mesh):
    text = jax.jit(jax.value_and_grad(loss)).lower(table, ids).compile().as_text()
  lines = [line for line in text.splitlines() if ' = ' in line]
  crossing = [
    line for line in lines if any(f' {kind}(' in line for kind in ('all-gather', 'all-to-all'))
  ]
  assert crossing and not any('800' in line or '400' in line for line in crossing)
  # The gradients of copies, on devices of the data axis, are added: a quarter of the table each.
  sums = [line for line in lines if ' all-reduce(' in line and 'f32[400,16]' in line]
  assert len(sums) == 1


def test_plain_without_a_mesh():
  table, ids = jnp.arange(12.0).reshape(4, 3), jnp.asarray([[3, 0]])
  lookup = functools.partial(embed, table, ids, 'bfloat16')
  assert lookup().dtype == jnp.bfloat16
  assert lookup().tolist() == [[[9, 10, 11], [0, 1, 2]]]
