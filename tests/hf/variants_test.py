"""Every kind of Llama checkpoint that transformers writes, against transformers' own logits.

The sequence is longer than every scaled variant's original and extended context.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from fixtures import hf_models

from segjax.hf import reader
from segjax.model import heads

TOLERANCE = 1e-4
LENGTH = 48
_LOGITS = jax.jit(heads.logits, static_argnums=2)

BASE = {
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32,
  'initializer_range': 0.2,
  'rms_norm_eps': 1e-5,
  'pad_token_id': 0,
  'tie_word_embeddings': False,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 5e5,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}


def _plain(theta):
  return {'rope_parameters': {'rope_type': 'default', 'rope_theta': theta}}


# Changes of the config; options of saving; spelling of RoPE in config.json ('': transformers').
# Variants of one network share one program: they differ in their files only.
VARIANTS = {
  'llama-2': ({'num_key_value_heads': 4, **_plain(1e4)}, {}, ''),
  'llama-3': (_plain(5e5), {}, ''),
  'llama-3, old config': (_plain(5e5), {}, 'old'),
  'llama-3, eos list': ({**_plain(5e5), 'eos_token_id': [2, 3, 4]}, {}, ''),
  'llama-3.1': ({'rope_parameters': LLAMA3}, {}, ''),
  'llama-3.1, old config': ({'rope_parameters': LLAMA3}, {}, 'old'),
  'llama-3.1, legacy type': ({'rope_parameters': LLAMA3}, {}, 'legacy'),
  'llama-3.2': (
    {
      'rope_parameters': LLAMA3 | {'factor': 32.0},
      'tie_word_embeddings': True,
      'head_dim': 16,
      'num_attention_heads': 8,
      'num_key_value_heads': 1,
    },
    {},
    '',
  ),
  'linear': ({'rope_parameters': LINEAR}, {}, ''),
  'linear, legacy type': ({'rope_parameters': LINEAR}, {}, 'legacy'),
  'attention bias': ({**_plain(1e4), 'attention_bias': True}, {}, ''),
  'mlp bias': ({**_plain(1e4), 'mlp_bias': True}, {}, ''),
  'all biases, tied': (
    {**_plain(1e4), 'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True},
    {},
    '',
  ),
  'wide heads': ({**_plain(1e4), 'head_dim': 24, 'rms_norm_eps': 1e-3}, {}, ''),
  'bfloat16': (_plain(5e5), {'dtype': torch.bfloat16}, ''),
  'float16': (_plain(5e5), {'dtype': torch.float16}, ''),
  'shards': (_plain(5e5), {'max_shard_size': '20KB'}, ''),
  'bfloat16 shards, llama-3.1': (
    {'rope_parameters': LLAMA3},
    {'dtype': torch.bfloat16, 'max_shard_size': '10KB'},
    'old',
  ),
}


def _write(directory, variant):
  change, save, spelling = VARIANTS[variant]
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | change)))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.endswith('bias') or 'norm' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.to(save.get('dtype', torch.float32))
  model.save_pretrained(directory, max_shard_size=save.get('max_shard_size', '1GB'))
  if spelling:
    raw = json.loads((directory / 'config.json').read_text())
    rope = raw.pop('rope_parameters')
    raw['rope_theta'] = rope.pop('rope_theta')
    raw['torch_dtype'] = raw.pop('dtype')
    if spelling == 'legacy':
      rope['type'] = rope.pop('rope_type')
    raw['rope_scaling'] = None if rope.get('rope_type') == 'default' else rope
    (directory / 'config.json').write_text(json.dumps(raw))
  return directory


def _logits(directory, ids):
  config = reader.load_config(directory, remat='none')
  params = reader.load_params(directory, config, 'language')
  return np.asarray(_LOGITS(params, jnp.asarray(ids), config))


# Each flag, each scaling, each spelling and each dtype once; the others combine them otherwise.
_DEFAULT = (
  *('llama-2', 'llama-3, old config', 'llama-3.1', 'llama-3.2', 'linear, legacy type'),
  *('all biases, tied', 'wide heads', 'float16', 'bfloat16 shards, llama-3.1'),
)


@pytest.mark.parametrize(
  'variant',
  [pytest.param(name, marks=() if name in _DEFAULT else pytest.mark.campaign) for name in VARIANTS],
)
def test_logits_equal_transformers(variant, tmp_path):
  directory = _write(tmp_path, variant)
  ids = np.random.default_rng(0).integers(0, 64, (1, LENGTH), dtype=np.int32)
  expected = hf_models.torch_logits(directory, ids)
  assert np.abs(expected).max() > 0.5  # small logits would be equal to anything
  np.testing.assert_allclose(_logits(directory, ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('scaled', [True, False])
def test_scaling_matters_at_that_length(scaled, tmp_path):
  # If the sequence were too short, the test above would pass without scaling.
  directory = _write(tmp_path, 'llama-3.1')
  ids = np.random.default_rng(0).integers(0, 64, (1, LENGTH), dtype=np.int32)
  expected = hf_models.torch_logits(directory, ids)
  raw = json.loads((directory / 'config.json').read_text())
  if scaled:
    raw['rope_parameters']['original_max_position_embeddings'] = 32
  else:
    raw['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 5e5}
  (directory / 'config.json').write_text(json.dumps(raw))
  assert np.abs(_logits(directory, ids) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_tied_with_a_head_in_the_file(dtype, tmp_path):
  directory = hf_models.write(tmp_path, 'llama32', dtype=dtype)
  ids = np.random.default_rng(0).integers(0, 64, (1, LENGTH), dtype=np.int32)
  tensors = hf_models.tensors(directory)
  head = tensors['model.embed_tokens.weight'].copy()

  def save(head):
    file = directory / 'model.safetensors'
    safetensors.numpy.save_file(tensors | {'lm_head.weight': head}, file, metadata={'format': 'pt'})

  save(head)
  expected = hf_models.torch_logits(directory, ids)
  np.testing.assert_allclose(_logits(directory, ids), expected, rtol=0, atol=TOLERANCE)
  # transformers 4 drops a head of its own, transformers 5 uses it.
  head[5, 7] += 1
  for other in (head, head[:-1], head.astype(np.float16)):
    save(other)
    with pytest.raises(ValueError, match=r'tensor lm_head\.weight is not model\.embed_tokens'):
      _logits(directory, ids)
