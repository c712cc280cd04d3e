"""Pages against arrays that are filled position by position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from segjax.model.attention import KeyValue
from segjax.model.llama import LlamaConfig
from segjax.model.pages import append, copy_pages, empty_pages, gather_view, page_size, write

LAYERS, HEADS, SIZE, NUM_PAGES, POSITIONS = 3, 3, 4, 7, 5  # a kernel for TPU has 4 heads
CONFIG = LlamaConfig(
  vocab_size=16,
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=LAYERS,
  num_attention_heads=6,
  num_key_value_heads=HEADS,
  head_dim=SIZE,
)
LAYOUTS = ('xla', 'triton', 'ragged')


def filled(layout, seed=0):
  """Pages of random numbers."""
  rng = np.random.default_rng(seed)
  empty = empty_pages(CONFIG, 1, NUM_PAGES, POSITIONS, layout)
  return jax.tree.map(lambda x: x.at[..., :SIZE].set(rng.normal(size=(*x.shape[:-1], SIZE))), empty)


def by_index(pages):
  """Returns keys and values as [L N, P, K, h], whatever the layout."""
  if pages.value is None:
    assert not np.any(pages.key[..., SIZE:])
    both = np.array(pages.key[..., :SIZE])
    return both[:, :, 0 : 2 * HEADS : 2], both[:, :, 1 : 2 * HEADS : 2]
  return tuple(np.array(x.transpose(1, 2, 0, 3)) for x in pages)


def normal(*shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_empty_pages(layout, dtype):
  pages = empty_pages(dataclasses.replace(CONFIG, dtype=dtype), 2, NUM_PAGES, POSITIONS, layout)
  entries = 2 * LAYERS * NUM_PAGES
  for x in by_index(pages):
    assert x.shape == (entries, POSITIONS, HEADS, SIZE)
    assert x.dtype == jnp.dtype(dtype)
    assert not np.any(x)
  assert page_size(pages) == POSITIONS
  assert (pages.value is None) == (layout == 'ragged')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_write_changes_the_positions_alone(layout):
  pages = filled(layout)
  key, value = normal(4, HEADS, SIZE), normal(4, HEADS, SIZE, seed=2)
  index, offset = np.array([1, 8, 8, 20]), np.array([0, 4, 0, 2])
  expected = by_index(pages)
  for array, new in zip(expected, (key, value), strict=True):
    for token in range(4):
      array[index[token], offset[token]] = new[token]
  actual = by_index(jax.jit(write)(pages, key, value, jnp.asarray(index), jnp.asarray(offset)))
  assert_array_equal(actual, expected)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_copy_pages_copies_in_all_layers(layout):
  pages = filled(layout)
  # Page 4 is a source and a target: the sources are read first. The last two entries are unused.
  source, target = np.array([4, 2, 2, 0, 0]), np.array([5, 4, 6, 0, 0])
  before, expected = by_index(pages), by_index(pages)
  for array, old in zip(expected, before, strict=True):
    for layer in range(LAYERS):
      for s, t in zip(source, target, strict=True):
        array[layer * NUM_PAGES + t] = old[layer * NUM_PAGES + s]
  copied = jax.jit(copy_pages, static_argnums=3)(pages, source, target, LAYERS)
  assert_array_equal(by_index(copied), expected)


def test_gather_view_puts_the_pages_of_a_row_in_order():
  pages = filled('xla')
  keys, values = by_index(pages)
  table = np.array([[3, 20, 3], [1, 0, 7]])
  view = gather_view(pages, jnp.asarray(table))
  for row, position in np.ndindex(2, 3 * POSITIONS):
    at = table[row, position // POSITIONS], position % POSITIONS
    assert_array_equal(view.key[row, :, :, position], keys[at])
    assert_array_equal(view.value[row, :, position], values[at])


def test_append_writes_the_buffer_across_pages():
  """Rows that end within a page, at its end, in the last page, and a row that writes nothing."""
  pages, trash = filled('xla'), NUM_PAGES
  table = trash + np.array([[1, 2], [3, 4], [5, 6], [0, 0]])
  position, count = np.array([3, 4, 8, 0]), np.array([4, 6, 2, 0])
  length = 6  # of the buffer: of row 2 it ends beyond the table
  recent = KeyValue(normal(4, HEADS, SIZE, length), normal(4, HEADS, length, SIZE, seed=2))
  expected = by_index(pages)
  for row in range(4):
    for step in range(count[row]):
      page, offset = divmod(position[row] + step, POSITIONS)
      expected[0][table[row, page], offset] = recent.key[row, :, :, step]
      expected[1][table[row, page], offset] = recent.value[row, :, step]
  arguments = [jnp.asarray(x) for x in (table, position, count)]
  actual = by_index(jax.jit(append)(pages, recent, *arguments, trash))
  for array, target in zip(actual, expected, strict=True):
    assert_array_equal(np.delete(array, trash, 0), np.delete(target, trash, 0))
    assert set(np.unique(array[trash])) <= {0, *np.unique(target[trash])}  # zeros alone are new


def test_appended_positions_are_gathered():
  pages = empty_pages(CONFIG, 1, NUM_PAGES, POSITIONS, 'xla')
  table, zeros = jnp.array([[2, 1, 4], [3, 5, 6]]), jnp.zeros(2, jnp.int32)
  recent = KeyValue(normal(2, HEADS, SIZE, 8), normal(2, HEADS, 8, SIZE, seed=2))
  count = jnp.array([8, 6])
  view = gather_view(append(pages, recent, table, zeros, count, 0), table)
  for row in range(2):
    assert_array_equal(view.key[row, ..., : count[row]], recent.key[row, ..., : count[row]])
    assert_array_equal(view.value[row, :, : count[row]], recent.value[row, :, : count[row]])
    assert not np.any(view.key[row, ..., count[row] :])
