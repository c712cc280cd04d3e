"""Checkpoints of other kinds, broken and hostile ones: one line, quickly, in little memory."""

import json
import resource
import struct
import time

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from fixtures import hf_models

from segjax.data.tokenizer_files import generation_stops, load_fast_tokenizer
from segjax.errors import UserError
from segjax.hf import checkpoint, reader, verify
from segjax.hf.config import config_from_hf
from segjax.run import arguments

CONFIG = {
  'model_type': 'llama',
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
}


def refuse(function, *parts):
  """Asserts that a call ends in one line with these parts, in a second and 300 MB."""
  start, memory = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(UserError) as error:
    function()
  assert time.thread_time() - start < 1
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10
  for part in parts:
    assert part in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'change, part',
  [
    ({'num_hidden_layers': 20_000_000}, 'num_hidden_layers is 20000000'),
    ({'vocab_size': 10**12}, 'vocab_size is 1000000000000'),
    ({'hidden_size': '32'}, "hidden_size is '32'"),
    ({'num_attention_heads': True}, 'num_attention_heads is True'),
    ({'max_position_embeddings': 1e30}, 'max_position_embeddings is 1e+30'),
    ({'head_dim': float('inf')}, 'head_dim is inf'),
    ({'head_dim': float('nan')}, 'head_dim is nan'),
    ({'num_key_value_heads': [2]}, 'num_key_value_heads is [2]'),
    ({'tie_word_embeddings': 'false'}, "tie_word_embeddings is 'false'; it must be true or false"),
    ({'attention_bias': 1}, 'attention_bias is 1'),
    (
      {'rope_scaling': 'linear'},
      "config: rope_scaling is 'linear'; it must be",
    ),
    ({'rope_scaling': [1, 2]}, 'rope_scaling is [1, 2]'),
    ({'rope_parameters': 5}, 'rope_parameters is 5'),
    ({'rope_scaling': {'rope_type': ['linear']}}, "rope type ['linear']"),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': '2'}}, "it is '2'"),
    ({'rope_theta': '10000'}, "rope_theta is '10000'"),
    ({'rope_theta': {}}, 'rope_theta is {}'),
  ],
)
def test_fields_of_config(change, part):
  refuse(lambda: config_from_hf(CONFIG | change), part)


@pytest.mark.parametrize('name', ['a{b}', '{layer.__class__}', 5, ['score']])
def test_name_of_a_head(name):
  refuse(lambda: reader.head_name({'value_head_prefix': name}), 'not the name of a module')


@pytest.mark.parametrize('file', [checkpoint.CONFIG, checkpoint.INDEX])
def test_deep_json(file, tmp_path):
  (tmp_path / checkpoint.CONFIG).write_text(json.dumps(CONFIG))
  (tmp_path / file).write_text('{"a": ' + '[' * 100_000)
  function = config_from_hf if file == checkpoint.CONFIG else checkpoint.open_checkpoint
  refuse(lambda: function(tmp_path), file, 'nested too deep')


def header(path, text):
  path.write_bytes(struct.pack('<Q', len(text)) + text)


def test_headers(tmp_path):
  file = tmp_path / checkpoint.WEIGHTS
  entry = b'"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
  header(file, b'{' + b','.join([entry % b'a'] * 30_000) + b'}')
  try:  # the library keeps the last of equal names
    assert list(checkpoint.read_header(file)) == ['a']
  except UserError as error:
    assert 'not a valid safetensors file' in str(error)
  header(file, b'{' + b','.join(entry % str(i).encode() for i in range(60_000)) + b'}')
  refuse(lambda: checkpoint.read_header(file), '60,000 tensors')
  header(file, b'{' + b' ' * (17 << 20) + b'}')
  refuse(lambda: checkpoint.read_header(file), 'has a header of 17,825,794 bytes')
  header(file, b'[' * 100_000)
  refuse(lambda: checkpoint.read_header(file), 'not a valid safetensors file')


def test_an_adapter_says_how_to_merge_it(tmp_path):
  (tmp_path / 'adapter_config.json').write_text('{"base_model_name_or_path": "owner/name"}')
  safetensors.numpy.save_file({'a': np.zeros(1)}, tmp_path / 'adapter_model.safetensors')
  refuse(lambda: checkpoint.open_checkpoint(tmp_path), 'holds an adapter', 'segjax convert merge')
  refuse(lambda: reader.load_config(tmp_path), 'peft_type=None is not LORA', 'merge_and_unload')


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'base_model.model.', 'bare'])
def test_prefixes_of_wrappers(prefix, tmp_path, llama3):
  """A backbone without `model.` is what LlamaModel saves; transformers reads it too."""
  source = hf_models.write(tmp_path / 'a', 'llama32') if prefix == 'bare' else llama3
  target = tmp_path / 'b'
  target.mkdir()
  (target / checkpoint.CONFIG).write_bytes((source / checkpoint.CONFIG).read_bytes())
  tensors = hf_models.tensors(source)
  if prefix == 'bare':
    tensors = {k.removeprefix('model.'): v for k, v in tensors.items() if k != 'lm_head.weight'}
  else:
    tensors = {prefix + k: v for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, target / checkpoint.WEIGHTS, metadata={'format': 'pt'})
  config = reader.load_config(target)
  hf_models.assert_same_params(
    reader.load_params(target, config, 'language'), reader.load_params(source, config, 'language')
  )
  if prefix == 'bare':
    assert verify.verify(target, length=8).passed


BROKEN = {
  'tokenizer.json': {
    'cut': ('{"version": "1.0", "model": {"vocab"', 'not valid JSON'),
    'foreign': ('{"architectures": ["Llama"]}', 'has no vocabulary'),
    'list': ('[1]', 'not an object'),
    'deep': ('{"model": ' + '[' * 100_000, 'nested too deep'),
    'model': ('{"model": {"type": "X", "vocab": {}, "merges": []}}', 'cannot load the tokenizer'),
    'merges': ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}}', 'cannot load'),
  },
  'tokenizer_config.json': {
    'cut': ('{"bos_token": ', 'not valid JSON'),
    'list': ('[]', 'not an object'),
    'deep': ('{"a": ' + '{"a": ' * 100_000, 'nested too deep'),
    'token': ('{"bos_token": 5}', 'cannot load the tokenizer'),
    'decoder': ('{"added_tokens_decoder": [1]}', 'cannot load the tokenizer'),
  },
}


@pytest.mark.parametrize('file, kind', [(file, kind) for file in BROKEN for kind in BROKEN[file]])
def test_files_of_a_tokenizer(file, kind, tmp_path):
  from fixtures import tokenizers

  load_fast_tokenizer(tokenizers.write_tokenizer(tmp_path))
  text, part = BROKEN[file][kind]
  (tmp_path / file).write_text(text)
  refuse(lambda: load_fast_tokenizer(str(tmp_path)), part)


@pytest.mark.parametrize('stops', ['"x"', '-1', '[1.5]', '{}', 'true'])
def test_stop_ids_of_generation(stops, tmp_path):
  (tmp_path / 'generation_config.json').write_text(f'{{"eos_token_id": {stops}}}')
  refuse(lambda: generation_stops(epath.Path(tmp_path)), 'eos_token_id holds', 'not a token id')


def test_one_message_in_place_of_a_list():
  refuse(lambda: arguments.check_is_list({'role': 'user', 'content': 'a'}), 'a single message')
