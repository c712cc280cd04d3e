"""Tiny random Llamas, written by transformers itself, and the comparison with them."""

from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import torch
import transformers

IDS = np.array([[1, 5, 9, 63, 0, 17, 33, 2, 40, 41, 42, 43], [7] * 12], np.int32)

_SIZES = {
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'initializer_range': 0.2,
  'pad_token_id': 0,
  'tie_word_embeddings': False,
}

# original_max_position_embeddings 16: of the four frequencies some are kept, some blended, some
# divided, so that a mistake in any of the three shows.
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 5e5,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}

KINDS = {
  'llama3': {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}},
  'llama31': {'rope_parameters': _LLAMA3},
  'llama32': {'rope_parameters': _LLAMA3, 'tie_word_embeddings': True, 'head_dim': 16},
  'linear': {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}},
  'biases': {
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
    'attention_bias': True,
    'mlp_bias': True,
  },
}


def write(
  directory: Path, kind: str = 'llama3', head: str = 'language', dtype: str = 'float32', **save
) -> Path:
  """A random model of `kind` in `directory`, biases and norms random too."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**(_SIZES | KINDS[kind]), num_labels=1)
  language = head == 'language'
  model = (
    transformers.LlamaForCausalLM if language else transformers.LlamaForSequenceClassification
  )(config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.endswith('bias') or 'norm' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.to(getattr(torch, dtype)).save_pretrained(directory, **save)
  return directory


def tensors(directory: Path) -> dict[str, np.ndarray]:
  """All tensors of a checkpoint."""
  found = {}
  for file in sorted(directory.glob('*.safetensors')):
    found |= safetensors.numpy.load_file(file)
  return found


def assert_same_tensors(first: Path, second: Path) -> None:
  """Same names, dtypes, shapes and bits."""
  one, two = tensors(first), tensors(second)
  assert sorted(one) == sorted(two)
  for name in one:
    assert one[name].dtype == two[name].dtype, name
    assert one[name].shape == two[name].shape, name
    assert one[name].tobytes() == two[name].tobytes(), name


def assert_same_params(one: dict, two: dict) -> None:
  """Same tree, same bits."""
  assert jax.tree.structure(one) == jax.tree.structure(two)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
  ):
    assert a.dtype == b.dtype, path
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def torch_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
  """transformers' logits in float32, [B, S, V]."""
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
  with torch.no_grad():
    return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def torch_scores(directory: Path, ids: np.ndarray) -> np.ndarray:
  """transformers' score at the last token of each row, float32, [B]; no row may hold padding."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    directory, dtype=torch.float32
  )
  assert model.config.num_labels == 1
  with torch.no_grad():
    return model(torch.tensor(ids, dtype=torch.long)).logits[:, 0].numpy()
