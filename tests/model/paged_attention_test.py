"""Attention to pages against loops over rows, heads and positions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segjax.model import paged_attention as module
from segjax.model.paged_attention import (
  PrefillRows,
  decode_attention,
  prefill_attention,
  select_paged_attention,
)
from segjax.model.pages import Pages

NUM_PAGES, POSITIONS, SIZE = 12, 4, 16


def random_pages(kv_heads, seed=0):
  """Returns keys and values [N, P, K, h] in float64."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, NUM_PAGES, POSITIONS, kv_heads, SIZE))


def laid_out(keys_and_values, implementation):
  keys, values = jnp.asarray(keys_and_values, jnp.float32)
  if implementation == 'ragged':
    return Pages(jnp.stack([keys, values], 3).reshape(*keys.shape[:2], -1, SIZE), None)
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
LENGTH = np.array([9, 4, 12, 1, 5])  # within a page, at its end, all, a free row


@pytest.mark.parametrize('implementation', ['xla', 'triton'])
@pytest.mark.parametrize('heads, kv_heads', [(4, 2), (3, 3), (5, 1)])
def test_decode_attention(implementation, heads, kv_heads):
  keys_and_values = random_pages(kv_heads)
  query = np.random.default_rng(1).normal(size=(5, heads, SIZE))
  expected = [
    attend(query[row], *row_of(keys_and_values, TABLE[row], LENGTH[row])) for row in range(5)
  ]
  output = decode_attention(
    jnp.asarray(query, jnp.float32),
    laid_out(keys_and_values, implementation),
    jnp.asarray(TABLE, jnp.int32),
    jnp.asarray(LENGTH, jnp.int32),
    implementation,
    interpret=True,
  )
  assert_allclose(output, expected, atol=1e-5)  # float32


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


@pytest.mark.parametrize('implementation', ['xla', 'triton'])
@pytest.mark.parametrize('name', CHUNKS)
def test_prefill_attention(monkeypatch, name, implementation):
  monkeypatch.setattr(module, '_KEYS', 2 * POSITIONS)  # several blocks, the last with padding
  lengths, prefix, tokens = CHUNKS[name]
  rows = chunk(lengths, prefix, tokens)
  keys_and_values = random_pages(kv_heads=2)
  rng = np.random.default_rng(1)
  query = rng.normal(size=(tokens, 4, SIZE))
  key, value = rng.normal(size=(2, tokens, 2, SIZE))
  expected = np.zeros(query.shape)
  for row, count in enumerate(lengths):
    row_keys, row_values = row_of(keys_and_values, rows.table[row], rows.length[row])
    before = rows.length[row] - count
    for i in range(count):
      token, end = rows.start[row] + i, before + i + 1
      key[token], value[token] = row_keys[end - 1], row_values[end - 1]  # the chunk is in pages
      expected[token] = attend(query[token], row_keys[:end], row_values[:end])
  output = jax.jit(prefill_attention, static_argnums=5)(
    *(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
    laid_out(keys_and_values, implementation),
    jax.tree.map(jnp.asarray, rows),
    implementation,
  )
  assert_allclose(output, expected, atol=1e-5)  # float32
  assert_array_equal(np.asarray(output)[rows.segment == 0], 0)


def test_select_paged_attention():
  assert select_paged_attention('cpu', 'bfloat16', 128, 8) == 'xla'
  assert select_paged_attention('gpu', 'bfloat16', 128, 8) == 'triton'
  assert select_paged_attention('cuda', 'bfloat16', 64, 3) == 'triton'
  assert select_paged_attention('gpu', 'float32', 128, 8) == 'xla'
  assert select_paged_attention('gpu', 'bfloat16', 96, 8) == 'xla'
  assert select_paged_attention('gpu', 'bfloat16', 8, 8) == 'xla'
  assert select_paged_attention('tpu', 'bfloat16', 128, 8) == 'ragged'
  assert select_paged_attention('tpu', 'bfloat16', 128, 3) == 'xla'
