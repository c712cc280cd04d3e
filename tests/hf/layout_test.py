import dataclasses
import itertools

import jax
import pytest

from segjax.hf import layout
from segjax.model import heads, sharding
from segjax.model.llama import LlamaConfig

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 16)


@pytest.mark.parametrize('head', layout.HEADS)
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
  assert {entry.path: entry.shape for entry in layout.entries(config, head)} == shapes


def test_hf_names_are_distinct():
  names = [name for entry in layout.entries(CONFIG, 'language') for name in entry.hf_names()]
  assert len(set(names)) == len(names) == 3 + 9 * 3


def test_hf_name():
  assert (
    layout.hf_name('backbone/layers/query/kernel', 7) == 'model.layers.7.self_attn.q_proj.weight'
  )
  assert layout.hf_name('backbone/embedding') == 'model.embed_tokens.weight'
  assert layout.hf_name('scalar_head/kernel') == 'score.weight'
  assert layout.hf_name('scalar_head/kernel', score='v') == 'v.weight'


def test_hf_name_refuses():
  with pytest.raises(ValueError, match=r"'backbone/gate' is not in the table"):
    layout.hf_name('backbone/gate')
  with pytest.raises(ValueError, match='stacked ones only'):
    layout.hf_name('backbone/norm/scale', 0)
  with pytest.raises(ValueError, match='layer=None'):
    layout.hf_name('backbone/layers/query/kernel')
