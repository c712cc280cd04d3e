import dataclasses
import json

import numpy as np
import pytest
import transformers
from fixtures import hf_models

from segjax.hf.config import config_from_hf, config_to_hf
from segjax.model.llama import LlamaConfig
from segjax.model.rope import RopeScaling, rope_frequencies

RAW = {
  'model_type': 'llama',
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
}
LLAMA3 = {
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
SCALED = RopeScaling('llama3', 8.0, 1.0, 4.0, 16)


def _frequencies(directory):
  """transformers' frequencies for the config.json in `directory`."""
  config = transformers.AutoConfig.from_pretrained(directory)
  return transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq.numpy()


@pytest.mark.parametrize(
  ('rope', 'theta', 'scaling'),
  [
    ({}, 1e4, None),
    ({'rope_theta': 5e5, 'rope_scaling': None}, 5e5, None),
    ({'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **LLAMA3}}, 5e5, SCALED),
    ({'rope_scaling': {'type': 'linear', 'factor': 2}}, 1e4, RopeScaling('linear', 2.0)),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 7e4}}, 7e4, None),
    ({'rope_theta': 3e4, 'rope_parameters': {'rope_type': 'llama3', **LLAMA3}}, 3e4, SCALED),
    (
      {'rope_theta': 3e4, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 7e4}},
      7e4,
      None,
    ),
  ],
  ids=['none', 'plain', 'old-llama3', 'old-type', 'new', 'theta-outside', 'theta-inside-wins'],
)
def test_every_form_of_rope(rope, theta, scaling, tmp_path):
  config = config_from_hf(RAW | rope)
  assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
  (tmp_path / 'config.json').write_text(json.dumps(RAW | rope))
  np.testing.assert_allclose(
    rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling),
    _frequencies(tmp_path),
    rtol=1e-6,
  )


def test_defaults_are_those_of_transformers(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(RAW))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  ours = config_from_hf(tmp_path)
  for name in {field.name for field in dataclasses.fields(LlamaConfig)} & set(theirs.to_dict()):
    if name != 'dtype':  # ours is what to compute in, theirs what the file holds
      assert getattr(ours, name) == getattr(theirs, name), name
  assert ours == config_from_hf(tmp_path / 'config.json') == config_from_hf(RAW)


def test_runtime_fields():
  config = config_from_hf(RAW, dtype='bfloat16', remat='none')
  assert (config.dtype, config.remat) == ('bfloat16', 'none')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gemma'}, "model_type is 'gemma'; only llama, .* are read"),
    ({'model_type': ['llama']}, r"model_type is \['llama'\]"),
    ({'model_type': None}, 'model_type is None'),
    ({'quantization_config': {'quant_method': 'awq'}}, r'quantization_config \(awq\)'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'vocab_size': None}, 'vocab_size is missing; it must be an integer from 1 to'),
    ({'hidden_size': '32'}, "hidden_size is '32'"),
    ({'num_key_value_heads': 3}, 'num_key_value_heads=3.*do not fit'),
    ({'hidden_size': 34}, 'hidden_size=34.*do not fit'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, "rope type 'yarn' is not computed"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope type 'dynamic'"),
    ({'rope_scaling': {'type': 'linear'}}, "'linear' needs factor, a positive number; it is None"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8}}, "'llama3' needs low_freq_factor"),
    ({'rope_scaling': {'rope_type': 'llama3', **LLAMA3, 'high_freq_factor': 1}}, 'below high_freq'),
    ({'rope_theta': '10000'}, "rope_theta is '10000'; it must be a positive number"),
    ({'rope_parameters': {'full_attention': {'rope_type': 'default'}}}, "'full_attention' layers"),
    ({'rms_norm_eps': -1}, 'rms_norm_eps is -1'),
    ({'head_dim': '8'}, "head_dim is '8'"),
    ({'num_key_value_heads': 1.5}, r'num_key_value_heads is 1\.5'),
    ({'num_hidden_layers': True}, 'num_hidden_layers is True'),
    ({'sliding_window': '4096'}, "sliding_window is '4096'; it must be an integer"),
    ({'num_local_experts': 8}, 'num_local_experts is 8; mixtures of experts'),
    ({'model_type': 'mixtral', 'num_local_experts': 8}, "model_type is 'mixtral'"),
    ({'partial_rotary_factor': 0.5}, r'partial_rotary_factor=0\.5 is not computed'),
  ],
)
def test_refuses(change, message, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(RAW | change))
  with pytest.raises(ValueError, match=message) as error:
    config_from_hf(tmp_path)
  assert str(tmp_path / 'config.json') in str(error.value)


def test_accepts_what_changes_nothing():
  same = {'sliding_window': None, 'num_experts': 1, 'hidden_act': 'swish', 'pretraining_tp': 2}
  assert config_from_hf(RAW | same) == config_from_hf(RAW)
  unused = {'sliding_window': 16, 'use_sliding_window': False, 'quantization_config': None}
  assert config_from_hf(RAW | unused) == config_from_hf(RAW)


def test_refuses_missing_key():
  raw = {key: value for key, value in RAW.items() if key != 'num_hidden_layers'}
  with pytest.raises(ValueError, match='config: num_hidden_layers is missing'):
    config_from_hf(raw)


@pytest.mark.parametrize('kind', hf_models.KINDS)
@pytest.mark.parametrize('head', ['language', 'scalar'])
def test_transformers_reads_what_is_written(kind, head, tmp_path):
  made = transformers.LlamaConfig(**(RAW | {'hidden_size': 32} | hf_models.KINDS[kind]))
  made.save_pretrained(tmp_path / 'a')
  config = config_from_hf(tmp_path / 'a')
  written = config_to_hf(config, head, dtype='bfloat16', extra={'eos_token_id': [2, 3]})
  assert config_from_hf(written) == config
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'config.json').write_text(json.dumps(written))
  read = transformers.AutoConfig.from_pretrained(tmp_path / 'b')
  assert {k: v for k, v in read.rope_parameters.items() if k != 'type'} == made.rope_parameters
  assert str(read.dtype) == 'torch.bfloat16'
  assert (read.bos_token_id, read.eos_token_id) == (None, [2, 3])
  assert head == 'language' or read.num_labels == 1
  np.testing.assert_allclose(
    rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling),
    _frequencies(tmp_path / 'b'),
    rtol=1e-6,
  )


def test_keeps_unknown_keys_of_the_base():
  base = RAW | {
    'mean': 0.2,
    'eos_token_id': [2, 3],
    'dtype': 'float16',
    'vocab_size': 65,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 7e4},
    'auto_map': {'AutoModel': 'code.py'},
    'id2label': {'0': 'LABEL_0'},
  }
  config = config_from_hf(RAW)
  written = config_to_hf(config, 'language', base_config=base)
  assert (written['mean'], written['eos_token_id'], written['vocab_size']) == (0.2, [2, 3], 64)
  assert (written['torch_dtype'], written['rope_theta']) == ('float16', 1e4)
  assert not {'rope_parameters', 'dtype', 'auto_map', 'id2label'} & set(written)


def test_refuses_extra_keys_that_the_model_decides():
  with pytest.raises(ValueError, match="extra config key 'vocab_size'"):
    config_to_hf(config_from_hf(RAW), 'language', extra={'vocab_size': 3})
