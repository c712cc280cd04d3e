"""The flash kernels for CUDA, interpreted on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segjax.model import flash_kernels
from segjax.model.attention import attention
from segjax.model.flash import flash

LENGTH = 40  # no multiple of a block of queries


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
  if 'shipped_blocks' not in request.fixturenames:
    monkeypatch.setattr(flash_kernels, 'OWN', 16)
    monkeypatch.setattr(flash_kernels, 'OTHER', 8)


@pytest.fixture
def shipped_blocks():
  return flash_kernels.OWN, flash_kernels.OTHER


def packed(*rows, length=LENGTH):
  """Segment ids of rows of sequences of these lengths; padding follows."""
  ids = [np.repeat(range(len(row) + 1), [length - sum(row), *row]) for row in rows]
  return np.stack([np.roll(row, -np.sum(row == 0)) for row in ids])


# Ends inside of blocks and at their borders; one sequence; short ones; padding alone.
ROWS = packed([10, 11, 13], [16, 8, 16], [LENGTH], [1, 1, 2, 3, 24], [])


def arrays(ids, heads, kv_heads, size, dtype=jnp.float32):
  """Query, key, value and the weights of the output's elements in a sum."""
  rng = np.random.default_rng(0)
  shapes = [(*ids.shape, n, size) for n in (heads, kv_heads, kv_heads, heads)]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def with_gradients(function):
  def run(query, key, value, weights, ids):
    output, backward = jax.vjp(lambda *x: function(*x, ids), query, key, value)
    return output, *backward(weights)

  return jax.jit(run)


by_flash = with_gradients(lambda *x: flash(*x, True))
by_xla = with_gradients(lambda *x: attention(*x[:3], segment_ids=x[3]))


def by_loops(query, key, value, ids):
  """One query at a time."""
  out, group = np.zeros(query.shape), query.shape[2] // key.shape[2]
  for b, q, h in np.ndindex(*query.shape[:3]):
    seen = np.flatnonzero((ids[b, : q + 1] == ids[b, q]) & (ids[b, q] > 0))
    if seen.size:
      logits = key[b, seen, h // group] @ query[b, q, h] / np.sqrt(query.shape[3])
      weight = np.exp(logits) / np.sum(np.exp(logits))
      out[b, q, h] = weight @ value[b, seen, h // group]
  return out


def test_packed_rows():
  """Forward against loops, gradients against those that jax derives; both are 0 for padding."""
  tensors = arrays(ROWS, 4, 2, 8)
  results = by_flash(*tensors, ROWS)
  assert_allclose(results[0], by_loops(*map(np.asarray, tensors[:3]), ROWS), atol=1e-5)  # float32
  for got, expected in zip(results[1:], by_xla(*tensors, ROWS)[1:], strict=True):
    assert_allclose(got, expected, atol=1e-5)  # float32
  for got in map(np.asarray, results):
    assert np.all(got[ROWS == 0] == 0)


def test_other_sequences_are_not_read():
  """Blocks without a token of the same sequence: a NaN there would spread."""
  ids = packed([16, 16, 8], [16, 24], [LENGTH], [LENGTH], [LENGTH])
  tensors = arrays(ids, 4, 2, 8)
  expected = by_flash(*tensors, ids)
  spoilt = [x.at[0, 16:32].set(jnp.nan) for x in tensors]
  for got, clean in zip(by_flash(*spoilt, ids), expected, strict=True):
    assert np.all(np.isnan(got[0, 16:32]))
    assert_array_equal(np.delete(got[0], slice(16, 32), 0), np.delete(clean[0], slice(16, 32), 0))


@pytest.mark.campaign
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('heads', 'kv_heads'), [(1, 1), (4, 1), (8, 1), (8, 8)])
def test_groups_and_precisions(heads, kv_heads, dtype):
  tensors = arrays(ROWS, heads, kv_heads, 16, dtype)
  # XLA rounds the weights of the softmax after division, the kernel before it.
  atol = 1e-5 if dtype == jnp.float32 else 0.06
  for got, expected in zip(by_flash(*tensors, ROWS), by_xla(*tensors, ROWS), strict=True):
    assert got.dtype == dtype
    assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), atol=atol)


@pytest.mark.campaign
@pytest.mark.parametrize('length', [128, 192, 300])
@pytest.mark.usefixtures('shipped_blocks')
def test_shipped_blocks(length):
  ids = packed([64, 50], [length], [128], length=length)
  tensors = arrays(ids, 2, 1, 64)
  run = with_gradients(lambda *x: flash(*x, True))
  for got, expected in zip(run(*tensors, ids), by_xla(*tensors, ids), strict=True):
    assert_allclose(got, expected, atol=2e-5)  # float32


def test_ids_in_any_order():
  ids = np.array([[3] * 9 + [1] * 8 + [0] * 3 + [2] * 12 + [1] * 8] * 5)
  tensors = arrays(ids, 4, 2, 8)
  for got, expected in zip(by_flash(*tensors, ids), by_xla(*tensors, ids), strict=True):
    assert_allclose(got, expected, atol=1e-5)  # float32


@pytest.mark.campaign
def test_no_segment_ids_is_one_sequence_per_row():
  tensors = arrays(ROWS, 4, 2, 8)
  run = with_gradients(lambda *x: flash(*x[:3], None, True))
  for got, expected in zip(
    run(*tensors, ROWS), by_flash(*tensors, np.ones_like(ROWS)), strict=True
  ):
    assert_array_equal(got, expected)
