"""Damaged checkpoints are a one-line error with file and tensor, and nothing is written."""

import json
import re
import struct

import numpy as np
import pytest
from fixtures import hf_models

from segjax.hf import checkpoint, convert, reader

NAME = 'model.layers.1.mlp.up_proj.weight'


@pytest.fixture
def source(sharded_llama31, tmp_path):
  """A copy to be damaged, in shards."""
  target = tmp_path / 'source'
  target.mkdir()
  for file in sharded_llama31.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  return target


def _config(**changes):
  def change(source):
    file = source / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return change


def _index(change):
  def apply(source):
    file = source / checkpoint.INDEX
    raw = json.loads(file.read_text())
    change(raw['weight_map'])
    file.write_text(json.dumps(raw))

  return apply


def _shard(source):
  return source / json.loads((source / checkpoint.INDEX).read_text())['weight_map'][NAME]


def _header(change):
  """Rewrites the header of NAME's file; `change` takes the parsed header."""

  def apply(source):
    file = _shard(source)
    content = file.read_bytes()
    length = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + length :])

  return apply


def _missing_shard(source):
  _shard(source).unlink()


def _truncated(source):
  file = _shard(source)
  file.write_bytes(file.read_bytes()[:-100])


def _empty(source):
  _shard(source).write_bytes(b'')


def _twice_in_two_shards(source):
  file = _shard(source)
  (source / 'more.safetensors').write_bytes(file.read_bytes())
  _index(lambda names: names.update({NAME: 'more.safetensors'}))(source)


def _not_finite(source):
  file = _shard(source)
  tensor = checkpoint.read_header(file)[NAME]
  with file.open('r+b') as stream:
    stream.seek(tensor.offset + 4)
    stream.write(np.float32(np.nan).tobytes())


def _pickles(source):
  for file in source.glob('model*'):
    file.unlink()
  (source / 'pytorch_model.bin').write_bytes(b'')


# The damage, and parts of the message; SHARD is NAME's file.
DAMAGES = {
  'missing shard': (_missing_shard, ['SHARD is missing']),
  'truncated': (_truncated, ['SHARD', 'file not fully covered']),
  'empty file': (_empty, ['SHARD (0 bytes) is not a valid safetensors file']),
  'offsets': (
    _header(lambda h: h[NAME].update(data_offsets=[0, 4])),
    ['SHARD', 'is not a valid safetensors file'],
  ),
  'shape in header': (
    _header(lambda h: h[NAME].update(shape=[48, 33])),
    ['SHARD', 'is not a valid safetensors file'],
  ),
  'shape': (
    _header(lambda h: h[NAME].update(shape=[32, 48])),
    ['SHARD', f'tensor {NAME} has shape [32, 48]', 'should be [48, 32]'],
  ),
  'dtype': (
    _header(lambda h: h[NAME].update(dtype='I32')),  # as wide as float32
    ['SHARD', f'tensor {NAME} has dtype I32', 'quantized'],
  ),
  'unexpected': (
    _header(lambda h: h.update({'model.layers.1.mlp.gate_up': h.pop(NAME)})),
    ['SHARD', f'tensor {NAME} is not in it'],
  ),
  'unexpected, in the index too': (
    lambda source: (
      _header(lambda h: h.update(extra=h.pop(NAME)))(source),
      _index(lambda names: names.update(extra=names.pop(NAME)))(source),
    ),
    [checkpoint.INDEX, f'lacks tensor {NAME}'],
  ),
  'twice in two shards': (_twice_in_two_shards, ['more.safetensors', 'is in another shard too']),
  'rope': (
    _config(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}),
    ['config.json', "rope type 'yarn'"],
  ),
  'quantized': (
    _config(quantization_config={'quant_method': 'gptq'}),
    ['config.json', 'quantization_config (gptq)'],
  ),
  'experts': (_config(num_local_experts=8), ['config.json', 'num_local_experts is 8']),
  'other model': (_config(model_type='mixtral'), ['config.json', "model_type is 'mixtral'"]),
  'more layers': (
    _config(num_hidden_layers=3),
    [checkpoint.INDEX, 'lacks tensors model.layers.2.'],
  ),
  'fewer layers': (_config(num_hidden_layers=1), ['.safetensors holds tensors model.layers.1.']),
  'parent directory': (
    _index(lambda names: names.update({NAME: '../intact/x.safetensors'})),
    [checkpoint.INDEX, f'tensor {NAME}', "'../intact/x.safetensors'"],
  ),
  'absolute path': (
    _index(lambda names: names.update({NAME: '/etc/passwd'})),
    [checkpoint.INDEX, f'tensor {NAME}', "'/etc/passwd'"],
  ),
  'pickles': (_pickles, ['pytorch_model.bin', 'pickle', 'save_pretrained']),
}


@pytest.mark.parametrize('kind', DAMAGES)
def test_refuses_before_anything_is_written(kind, source, tmp_path):
  change, parts = DAMAGES[kind]
  shard = str(_shard(source))
  change(source)
  with pytest.raises(ValueError) as error:
    convert.import_checkpoint(source, tmp_path / 'out')
  for part in parts:
    assert part.replace('SHARD', shard) in str(error.value)
  assert '\n' not in str(error.value)
  assert [file.name for file in tmp_path.iterdir()] == ['source']


def test_not_finite_is_a_warning_or_refused(source, tmp_path, caplog):
  _not_finite(source)
  message = f'NaN or infinity in tensor {NAME} ({_shard(source).name})'
  with pytest.raises(ValueError, match=re.escape(message)):
    convert.import_checkpoint(source, tmp_path / 'out', strict=True)
  assert [file.name for file in tmp_path.iterdir()] == ['source']
  caplog.clear()
  out = convert.import_checkpoint(source, tmp_path / 'out')
  assert message in caplog.text
  back = convert.export_checkpoint(out, tmp_path / 'back')
  assert np.isnan(hf_models.tensors(back)[NAME]).sum() == 1


def test_reward_model_without_a_head(source, tmp_path):
  config = reader.load_config(source)
  _, entries = reader.open_model(source, config, 'scalar')
  assert 'scalar_head/kernel' not in {entry.path for entry in entries}
  with pytest.raises(ValueError, match='no scalar head, so it is not a reward model'):
    convert.import_checkpoint(source, tmp_path / 'out', role='reward')
  assert [file.name for file in tmp_path.iterdir()] == ['source']
