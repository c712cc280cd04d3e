"""Blocks of a prefix that the host counts, against those that the program counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_array_equal

from segjax.model import decode, paged_attention
from segjax.model.decode_weights import decode_weights
from segjax.model.generate import make_decode_config
from segjax.model.mesh import decode_mesh
from segjax.model.paged_attention import (
  PrefillRows,
  block_counts,
  prefill_attention,
  prefix_blocks,
)
from segjax.model.pages import Pages
from segjax.model.prefill_chunks import Read, prefill_chunks
from segjax.model.sampling import Sampling

POSITIONS, SIZE, TOKENS = 4, 16, 8
TABLE = np.array([[5, 1, 4], [3, 2, 6]], np.int32)


def chunk(prefix):
  """Returns the rows of a chunk: 2 tokens, the first `prefix` have been read before, and 3."""
  segment = np.repeat(np.array([1, 2, 0], np.int32), [2, 3, 3])
  length, start = np.array([prefix + 2, 3], np.int32), np.array([0, 2, 5], np.int32)
  return PrefillRows(segment, TABLE, length, start, np.int32(2))


def random_pages():
  key, value = np.random.default_rng(0).normal(size=(2, 2, 7, POSITIONS, SIZE))
  return Pages(np.float32(key), np.float32(value))


def prefilled(rows, pages, blocks):
  rng = np.random.default_rng(1)
  heads = [jnp.asarray(rng.normal(size=(TOKENS, n, SIZE)), jnp.float32) for n in (4, 2, 2)]
  run = jax.jit(prefill_attention, static_argnums=(5, 6))
  return np.asarray(run(*heads, pages, rows, 'triton', blocks))


@pytest.mark.parametrize(('prefix', 'needed'), [(0, 0), (1, 1), (2, 1), (3, 2), (6, 2), (10, 3)])
def test_needed_blocks_and_more_give_the_same_bits(monkeypatch, prefix, needed):
  monkeypatch.setattr(paged_attention, '_KEYS', POSITIONS)  # a block is a page, of three
  rows, pages = chunk(prefix), random_pages()
  in_groups = jax.tree.map(lambda x: x[None], rows)
  assert prefix_blocks(in_groups, POSITIONS, 'triton') == needed
  expected = prefilled(rows, pages, None)
  for blocks in range(needed, 4):
    assert_array_equal(prefilled(rows, pages, blocks), expected)


@pytest.mark.parametrize('blocks', [None, 1])
def test_what_others_left_in_pages_beyond_a_row_is_not_read(blocks):
  """Row 0 ends in its second page of three, all of one block."""
  rows, pages = chunk(3), random_pages()
  expected = prefilled(rows, pages, blocks)
  for array in pages:
    array[:, TABLE[0, 2]] = np.nan
  assert_array_equal(prefilled(rows, pages, blocks), expected)


@pytest.mark.parametrize(
  ('columns', 'counts'),
  [(2, (0, 1)), (8, (0, 1)), (20, (0, 1, 2, 3)), (32, (0, 1, 2, 4)), (33, (0, 1, 2, 4, None))],
)
def test_numbers_of_blocks(columns, counts):
  """Of 8 pages of 64 positions; None where the program counts."""
  assert block_counts(columns, 64, 'triton') == counts
  assert block_counts(columns, 64, 'xla') == block_counts(columns, 64, 'ragged') == (None,)


def test_the_longest_row_with_a_prefix_decides():
  """Of two groups the first has no prefix, however long its row."""

  def blocks(length, prefix, implementation='triton'):
    start = np.array([[0, 600], [0, length - prefix]])
    rows = PrefillRows(None, np.zeros((2, 1, 40)), np.array([[600], [length]]), start, None)
    return prefix_blocks(rows, 64, implementation)

  assert [blocks(n, prefix=0) for n in (0, 1, 2000)] == [0, 0, 0]
  assert [blocks(n, prefix=1) for n in (2, 512, 513, 1025, 2048)] == [1, 1, 2, 4, 4]
  assert blocks(2049, prefix=1) is None and blocks(100, 1, 'xla') is None


@pytest.mark.campaign
def test_prompts_of_several_groups():
  """Prompts over two and three chunks beside short ones and none: the same bits in all pages."""
  mesh = decode_mesh(models.mesh(8), 4, 2)
  decoder = make_decode_config(models.CONFIG, Sampling(max_new_tokens=8), models.STOP_IDS, mesh)
  decoder = dataclasses.replace(decoder, paged_attention='triton', page_size=POSITIONS)
  groups = mesh.shape['data']
  lengths = [[11], [5, 20], [], [3, 3]]
  assert groups == len(lengths)
  ids = np.arange(20, dtype=np.int32)
  pages = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
  reads = [[Read(ids[:n], pages[i]) for i, n in enumerate(group)] for group in lengths]
  chosen, caches = [], []
  with jax.set_mesh(mesh):
    weights = decode_weights(models.params(models.CONFIG), decoder=decoder)
    for counted in (False, True):
      cache = decode.empty_pages(groups, 11, decoder=decoder)
      for part in prefill_chunks(reads, 5, TOKENS):
        blocks = prefix_blocks(part.rows, POSITIONS, 'triton') if counted else None
        chosen.append(blocks)
        cache = decode.prefill(weights, cache, part, decoder=decoder, prefix_blocks=blocks)
      caches.append(jax.tree.map(np.asarray, cache))
  assert chosen == [None] * 4 + [0, 1, 1, 1]
  jax.tree.map(assert_array_equal, *caches)
