import dataclasses
import itertools

import jax
import numpy as np
import pytest

from segjax.hf import tensor_names
from segjax.model import heads, sharding
from segjax.model.llama import LlamaConfig

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 16)


@pytest.mark.parametrize('head', tensor_names.HEADS)
@pytest.mark.parametrize(
  ('tied', 'attention_bias', 'mlp_bias'), list(itertools.product([False, True], repeat=3))
)
def test_table_agrees_with_the_network(head, tied, attention_bias, mlp_bias):
  config = dataclasses.replace(
    CONFIG, tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias
  )
  shapes = {
    sharding.path_name(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(heads.param_shapes(config, head))
  }
  assert {entry.path: entry.shape for entry in tensor_names.tensor_mappings(config, head)} == shapes


def test_hf_names_are_distinct():
  names = [
    name for entry in tensor_names.tensor_mappings(CONFIG, 'language') for name in entry.hf_names()
  ]
  assert len(set(names)) == len(names) == 3 + 9 * 3


@pytest.mark.parametrize(
  ('shape', 'stacked', 'transposed', 'index', 'max_bytes'),
  [
    ((3, 8, 6), True, True, np.s_[:, :, :], 50),
    ((3, 8, 6), True, True, np.s_[:, 2:6, 1:6], 1),
    ((3, 8), True, False, np.s_[1:3, :], 20),
    ((40, 6), False, False, np.s_[10:40, :], 100),
    ((6, 40), False, True, np.s_[:, 7:40], 100),
    ((6, 40), False, True, np.s_[:, :], 10_000),
  ],
)
def test_pieces_cover_the_slice_once(shape, stacked, transposed, index, max_bytes):
  entry = tensor_names.TensorMapping('a', 'a', shape, stacked, transposed)
  pieces = entry.pieces(index, 2, max_bytes)
  times = np.zeros(shape, int)
  for piece in pieces:
    times[piece] += 1
    size = times[piece].size
    row = size // len(range(*piece[-1].indices(shape[-1])) if transposed else times[piece])
    assert size * 2 <= max(max_bytes, 2 * row) or len(shape) == 1 + stacked
  expected = np.zeros(shape, int)
  expected[index] = 1
  np.testing.assert_array_equal(times, expected)
  assert (len(pieces) == 1) == (expected.sum() * 2 <= max_bytes)


def test_pieces_are_even():
  """Chunks of one size are stored, the last one padded to it."""
  entry = tensor_names.TensorMapping('a', 'a', (2, 3, 14), stacked=True, transposed=True)
  pieces = entry.pieces(np.s_[:, :, :], 2, 2 * 3 * 8)  # eight rows would do
  assert [(p[2].start, p[2].stop) for p in pieces] == 2 * [(0, 7), (7, 14)]
