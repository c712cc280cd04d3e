"""Attention to pages against loops over rows, heads and positions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as tpu_package
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as tpu_kernel
from numpy.testing import assert_allclose, assert_array_equal

from segjax.model import paged_attention, paged_kernels
from segjax.model.paged_attention import (
  PrefillRows,
  decode_attention,
  prefill_attention,
  select_paged_attention,
)
from segjax.model.pages import Pages, kernel_heads

NUM_PAGES, POSITIONS, SIZE = 12, 4, 16


@pytest.fixture
def by_loops(monkeypatch):
  """Replaces the kernel for TPU by loops; `interpreted`, which is slow, is the kernel itself."""

  def kernel(query, pages, lengths, tables, starts, count, *, sm_scale, **blocks):
    assert all(size > 0 for size in blocks.values())
    assert tables.shape[0] * 4 * 128 <= paged_kernels._SMEM
    assert count[0] > 0  # else the kernel ends before the first page has arrived
    assert np.all(np.diff(starts[: count[0] + 1]) > 0)
    pages = np.asarray(pages, np.float64)
    output = np.full(query.shape, np.nan)  # of tokens of no row: what is in the memory
    for row in range(count[0]):
      length, start, end = lengths[row], starts[row], starts[row + 1]
      keys, values = row_of((pages[:, :, 0::2], pages[:, :, 1::2]), tables[row], length)
      for token in range(start, end):
        seen = length - (end - 1 - token)
        scaled = np.asarray(query[token]) * sm_scale * np.sqrt(query.shape[2])
        output[token] = attend(scaled, keys[:seen], values[:seen])
    return jnp.asarray(output, query.dtype)

  monkeypatch.setattr(tpu_package, 'ragged_paged_attention', kernel)


@pytest.fixture
def interpreted(monkeypatch):
  """Interprets the kernel for TPU."""
  interpret = functools.partial(tpu_kernel.pl.pallas_call, interpret=True)
  monkeypatch.setattr(tpu_kernel.pl, 'pallas_call', interpret)
  # The interpreter asks an index for its shape, and an integer has none.
  monkeypatch.setattr(jax._src.literals.TypedInt, 'shape', (), raising=False)


def random_pages(kv_heads, seed=0):
  """Returns keys and values [2, N, P, K, h] in float64."""
  return np.random.default_rng(seed).normal(size=(2, NUM_PAGES, POSITIONS, kv_heads, SIZE))


def laid_out(keys_and_values, implementation, dtype='float32'):
  keys, values = jnp.asarray(keys_and_values, dtype)
  if implementation == 'ragged':
    both = jnp.stack([keys, values], 3).reshape(*keys.shape[:2], -1, SIZE)
    heads = 2 * kernel_heads(keys.shape[2]) - both.shape[2]
    return Pages(jnp.pad(both, [(0, 0)] * 2 + [(0, heads), (0, 128 - SIZE)]), None)
  return Pages(keys.transpose(2, 0, 1, 3), values.transpose(2, 0, 1, 3))


def attend(query, keys, values):
  """One token [H, h] to keys and values [S, K, h], head by head."""
  output = np.zeros(query.shape)
  group = query.shape[0] // keys.shape[1]
  for head in range(query.shape[0]):
    logits = keys[:, head // group] @ query[head] / np.sqrt(query.shape[1])
    weights = np.exp(logits - logits.max())
    output[head] = weights @ values[:, head // group] / weights.sum()
  return output


def row_of(keys_and_values, table, length):
  """Returns the keys and values of a row, position by position."""
  at = [(table[s // POSITIONS], s % POSITIONS) for s in range(length)]
  return [np.stack([array[index] for index in at]) for array in keys_and_values]


TABLE = np.array([[3, 1, 7], [2, 2, 0], [3, 1, 8], [0, 0, 0], [11, 10, 9]])  # 0 and 2 share pages
LENGTH = np.array([9, 4, 12, 1, 5])  # within a page, at its end, all, a free row, one more


def run(function, *args, **static):
  """Compiles the function, unless the kernel for TPU is replaced by loops: they need numbers."""
  if function is decode_attention:
    function = functools.partial(function, interpret=True, **static)
  *arrays, implementation = args
  arrays = jax.tree.map(jnp.asarray, arrays)
  if implementation == 'ragged':
    return function(*arrays, implementation)
  return jax.jit(function, static_argnums=len(arrays))(*arrays, implementation)


def check_decode(implementation, heads, kv_heads, table=TABLE, length=LENGTH):
  keys_and_values = random_pages(kv_heads)
  query = np.random.default_rng(1).normal(size=(len(length), heads, SIZE))
  expected = [
    attend(query[row], *row_of(keys_and_values, table[row], length[row]))
    for row in range(len(length))
  ]
  tensors = np.asarray(query, np.float32), laid_out(keys_and_values, implementation)
  rows = np.asarray(table, np.int32), np.asarray(length, np.int32)
  output = run(decode_attention, *tensors, *rows, implementation, kv_heads=kv_heads)
  assert_allclose(output, expected, atol=1e-5)  # float32


HEADS = [(4, 2), (3, 3), (5, 1), (10, 5)]


@pytest.mark.parametrize('implementation', ['xla', 'triton', 'ragged'])
@pytest.mark.parametrize('heads, kv_heads', HEADS)
def test_decode_attention(by_loops, implementation, heads, kv_heads):
  check_decode(implementation, heads, kv_heads)


@pytest.mark.parametrize('programs', [1, 20])
def test_rows_read_in_parts(monkeypatch, programs):
  """One part, and two parts of a table of three pages; above it was one page a part."""
  monkeypatch.setattr(paged_kernels, '_PROGRAMS', programs)
  check_decode('triton', 4, 2)


def test_tables_beyond_the_scalar_memory(monkeypatch, by_loops):
  """Two rows of a table at a time, of five."""
  monkeypatch.setattr(paged_kernels, '_SMEM', 2 * 4 * 128)
  check_decode('ragged', 4, 2)


@pytest.mark.campaign
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('implementation', ['xla', 'triton', 'ragged'])
def test_decode_attention_of_random_rows(interpreted, implementation, seed):
  rng = np.random.default_rng(seed)
  table = rng.integers(0, NUM_PAGES, (20, 6))
  length = rng.integers(1, 6 * POSITIONS + 1, 20)
  check_decode(implementation, *HEADS[seed % len(HEADS)], table, length)


@pytest.mark.parametrize('rows, columns', [(1024, 32), (128, 32), (96, 20), (8, 3), (3, 64)])
def test_number_of_parts(rows, columns):
  parts = paged_kernels._splits(rows, columns)
  # Enough programs, or a part for each page; half as many would be too few.
  assert rows * parts >= 1024 or parts >= columns
  assert parts == 1 or rows * parts // 2 < 1024
  assert parts < 2 * columns


def chunk(lengths, prefix, tokens):
  """Returns PrefillRows of rows of so many tokens in the chunk, row 0 with `prefix` before it."""
  rows = 4
  segment, start = np.zeros(tokens, np.int32), np.zeros(rows + 1, np.int32)
  length = np.zeros(rows, np.int32)
  for row, count in enumerate(lengths):
    segment[start[row] : start[row] + count] = row + 1
    start[row + 1] = start[row] + count
    length[row] = count + (prefix if row == 0 else 0)
  table = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3)[::-1]
  return PrefillRows(segment, table, length, start, np.int32(len(lengths)))


CHUNKS = {
  'no prefix': ([5, 1, 4], 0, 12),
  'one row': ([8], 0, 8),
  'prefix': ([5, 3], 6, 8),
  'prefix of whole pages': ([3, 2, 1, 4], 8, 12),
  'prefix and all of the row': ([4], 8, 4),
  'padding alone': ([], 0, 4),
}


def check_prefill(implementation, lengths, prefix, tokens, dtype='float32', kv_heads=2):
  rows = chunk(lengths, prefix, tokens)
  keys_and_values = random_pages(kv_heads)
  rng = np.random.default_rng(1)
  query = rng.normal(size=(tokens, 2 * kv_heads, SIZE))
  key, value = rng.normal(size=(2, tokens, kv_heads, SIZE))
  expected = np.zeros(query.shape)
  for row, count in enumerate(lengths):
    row_keys, row_values = row_of(keys_and_values, rows.table[row], rows.length[row])
    before = rows.length[row] - count
    for i in range(count):
      token, end = rows.start[row] + i, before + i + 1
      key[token], value[token] = row_keys[end - 1], row_values[end - 1]  # the chunk is in pages
      expected[token] = attend(query[token], row_keys[:end], row_values[:end])
  tensors = [jnp.asarray(x, dtype) for x in (query, key, value)]
  pages = laid_out(keys_and_values, implementation, dtype)
  output = run(prefill_attention, *tensors, pages, rows, implementation).astype(np.float32)
  assert_allclose(output, expected, atol=1e-5 if dtype == 'float32' else 0.03)
  assert_array_equal(np.asarray(output)[rows.segment == 0], 0)


@pytest.mark.parametrize('implementation', ['xla', 'ragged'])
@pytest.mark.parametrize('name', CHUNKS)
def test_prefill_attention(monkeypatch, by_loops, name, implementation):
  monkeypatch.setattr(paged_attention, '_KEYS', 2 * POSITIONS)  # several blocks, also padding
  check_prefill(implementation, *CHUNKS[name])


@pytest.mark.parametrize('kv_heads', [1, 3, 5])
def test_prefill_attention_of_other_numbers_of_heads(by_loops, kv_heads):
  check_prefill('ragged', *CHUNKS['prefix'], kv_heads=kv_heads)


@pytest.mark.campaign
@pytest.mark.parametrize('name', CHUNKS)
def test_prefill_attention_of_the_kernel(interpreted, name):
  check_prefill('ragged', *CHUNKS[name])


def test_prefill_of_triton_is_that_of_xla():
  check_prefill('triton', *CHUNKS['prefix'])


def test_prefill_in_bfloat16():
  """XLA for CPU has such products in some orders of dimensions alone."""
  check_prefill('xla', *CHUNKS['prefix'], dtype='bfloat16')


def test_what_is_not_finite_stays_in_its_prompt():
  """Two prompts of a chunk, of which the first is not finite."""
  rows = chunk([3, 4], 0, 8)
  rng = np.random.default_rng(1)
  tensors = [jnp.asarray(rng.normal(size=(8, n, SIZE)), jnp.float32) for n in (4, 2, 2)]
  pages = laid_out(random_pages(kv_heads=2), 'xla')
  output = run(prefill_attention, *tensors, pages, rows, 'xla')
  bad = [x.at[:3].set(np.inf * (-1) ** i) for i, x in enumerate(tensors)]
  changed = run(prefill_attention, *bad, pages, rows, 'xla')
  assert not np.any(np.isfinite(changed[:3]))
  assert_array_equal(changed[3:], output[3:])


@pytest.mark.parametrize(
  'platform, dtype, head_dim, expected',
  [
    ('cpu', 'bfloat16', 128, 'xla'),
    ('gpu', 'bfloat16', 128, 'triton'),
    ('cuda', 'bfloat16', 64, 'triton'),
    ('gpu', 'float32', 128, 'xla'),
    ('gpu', 'bfloat16', 96, 'xla'),
    ('gpu', 'bfloat16', 8, 'xla'),
    ('tpu', 'bfloat16', 128, 'ragged'),
    ('tpu', 'bfloat16', 64, 'ragged'),
    ('tpu', 'bfloat16', 256, 'xla'),
    ('tpu', 'float32', 128, 'ragged'),
  ],
)
def test_select_paged_attention(platform, dtype, head_dim, expected):
  assert select_paged_attention(platform, dtype, head_dim) == expected
