import json
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from segjax.hf import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def _save(directory, name='model.safetensors', **tensors):
  directory.mkdir(exist_ok=True)
  tensors = tensors or {'a': np.zeros((2, 3), np.float32), 'b': np.zeros(4, np.float16)}
  safetensors.numpy.save_file(tensors, directory / name)
  return directory


def _index(directory, weight_map):
  (directory / checkpoint.INDEX).write_text(json.dumps({'weight_map': weight_map}))
  return directory


def test_reads_names_shapes_dtypes_and_offsets(tmp_path):
  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  _save(tmp_path, a=values, b=np.zeros(4, np.float16))
  opened = checkpoint.open_checkpoint(tmp_path)
  assert {name: (t.dtype, t.shape) for name, t in opened.tensors.items()} == {
    'a': ('F32', (2, 3)),
    'b': ('F16', (4,)),
  }
  assert opened.num_parameters() == 10
  tensor = opened.tensors['a']
  stored = np.fromfile(tensor.file, np.float32, tensor.size, offset=tensor.offset)
  np.testing.assert_array_equal(stored.reshape(tensor.shape), values)


@pytest.mark.parametrize('padding', ['', '   '])
def test_offsets_are_those_of_the_header(padding, tmp_path):
  # Not in the order of names, one tensor empty, one of another width.
  header = {
    'z': _entry(0, 16, (2, 4), 'BF16'),
    'empty': _entry(16, 16, (0, 3)),
    'a': _entry(16, 24, (2,)),
  }
  text = json.dumps(header).encode() + padding.encode()
  file = tmp_path / 'model.safetensors'
  file.write_bytes(struct.pack('<Q', len(text)) + text + bytes(24))
  for name, tensor in checkpoint.read_header(file).items():
    assert tensor.offset == 8 + len(text) + header[name]['data_offsets'][0]
    assert (tensor.dtype, list(tensor.shape)) == (header[name]['dtype'], header[name]['shape'])


def test_reads_shards(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _save(tmp_path, 'two.safetensors', b=np.zeros(3, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  assert checkpoint.open_checkpoint(tmp_path).num_parameters() == 5


def test_refuses_missing_shard(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  with pytest.raises(ValueError, match=r'two\.safetensors is missing.*1 tensors there.*first b'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_index_that_disagrees(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'one.safetensors'})
  with pytest.raises(ValueError, match='tensor b is not in it'):
    checkpoint.open_checkpoint(tmp_path)
  _save(tmp_path, 'two.safetensors', a=np.zeros(2, np.float32), b=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  with pytest.raises(ValueError, match='tensor a is in another shard too'):
    checkpoint.open_checkpoint(tmp_path)
  _index(tmp_path, {})
  with pytest.raises(ValueError, match='no "weight_map"'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_pickles_and_names_the_conversion(tmp_path):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'pytorch_model\.bin is a pickle.*save_pretrained'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_directory_without_weights(tmp_path):
  (tmp_path / 'adapter_model.safetensors').write_bytes(b'')
  with pytest.raises(ValueError, match=r'it holds adapter_model\.safetensors'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_a_file_that_is_not_safetensors(tmp_path):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(ValueError, match='but a git-lfs pointer'):
    checkpoint.open_checkpoint(tmp_path)
  file.write_bytes(b'')
  with pytest.raises(ValueError, match=r'\(0 bytes\) is not a valid safetensors file'):
    checkpoint.open_checkpoint(tmp_path)
  file.write_bytes(b'\x04' + b'\0' * 7 + b'nope')
  with pytest.raises(ValueError, match='invalid JSON in header'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_truncated_file(tmp_path):
  file = _save(tmp_path) / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match='file not fully covered'):
    checkpoint.open_checkpoint(tmp_path)


def _write_raw(file, header, data=b''):
  """Writes a safetensors file with any header, valid or not."""
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack('<Q', len(text)) + text + data)


def _entry(begin, end, shape=(2,), dtype='F32'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    ({'a': _entry(0, 8), 'b': _entry(12, 20)}, 'invalid offset for tensor `b`'),  # a gap
    ({'a': _entry(0, 8), 'b': _entry(4, 12)}, 'invalid offset for tensor `b`'),  # an overlap
    ({'a': _entry(0, 8), 'b': _entry(8, 24, (4,))}, 'file not fully covered'),  # too short
    ({'a': _entry(0, 8)}, 'file not fully covered'),  # bytes that no tensor holds
    ({'a': _entry(0, 16)}, 'invalid shape'),
    ({'a': None}, 'invalid JSON in header'),
    ({'a': _entry(0, 2, dtype='F8_E4M3')}, 'tensor a has dtype F8_E4M3.*quantized'),
  ],
)
def test_refuses_a_wrong_header(header, message, tmp_path):
  # The dtype is checked once the library has accepted the file, so there its size is right.
  size = 2 if 'F8' in str(header) else 16
  _write_raw(tmp_path / 'model.safetensors', header, bytes(size))
  with pytest.raises(ValueError, match=rf'model\.safetensors.*{message}') as error:
    checkpoint.open_checkpoint(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'shard', ['../one.safetensors', '/etc/passwd', 'a/b', '..', '', 'a\\b', None, 3, ['a']]
)
def test_refuses_an_index_that_leaves_its_directory(shard, tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  inner = _index(_save(tmp_path / 'inner', 'x', c=np.zeros(1)), {'b': shard})
  with pytest.raises(ValueError, match=r'index\.json puts tensor b into .* not followed'):
    checkpoint.open_checkpoint(inner)


def test_follows_the_links_of_the_hub_cache(tmp_path):
  # snapshots/REVISION/NAME -> ../../blobs/HASH
  blob = _save(tmp_path / 'blobs', 'hash', a=np.zeros(2, np.float32)) / 'hash'
  snapshot = tmp_path / 'snapshots' / 'revision'
  snapshot.mkdir(parents=True)
  (snapshot / 'one.safetensors').symlink_to(Path('..', '..', 'blobs', blob.name))
  _index(snapshot, {'a': 'one.safetensors'})
  assert checkpoint.open_checkpoint(snapshot).num_parameters() == 2


def test_refuses_an_index_with_a_repeated_tensor(tmp_path):
  (tmp_path / checkpoint.INDEX).write_text('{"weight_map": {"a": "x", "b": "y", "a": "z"}}')
  with pytest.raises(ValueError, match=r"index\.json is not valid JSON \('a' occurs twice\)"):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_integer_weights(tmp_path):
  _save(tmp_path, a=np.zeros(2, np.int8))
  with pytest.raises(ValueError, match=r'tensor a has dtype I8.*quantized'):
    checkpoint.open_checkpoint(tmp_path)


def test_refuses_invalid_config(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json does not exist'):
    checkpoint.read_json(tmp_path / 'config.json')
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='not valid JSON'):
    checkpoint.read_json(tmp_path / 'config.json')
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match='a JSON list'):
    checkpoint.read_json(tmp_path / 'config.json')


@pytest.mark.parametrize(
  'name', ['./nothing/here', '/nothing/here', '~/nothing', 'a/b/c', 'nothing', '../x/', 'a/b/']
)
def test_missing_directory_is_not_looked_up(name, monkeypatch):
  monkeypatch.setattr(huggingface_hub, 'HfApi', None)
  with pytest.raises(ValueError, match=f'no directory {name}'):
    checkpoint.resolve_checkpoint(name)


def test_resolves_directory_and_refuses_file(tmp_path):
  assert checkpoint.resolve_checkpoint(str(tmp_path)) == tmp_path
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is a file'):
    checkpoint.resolve_checkpoint(tmp_path / 'file')
  with pytest.raises(ValueError, match='no directory'):
    checkpoint.resolve_checkpoint(tmp_path / 'missing')
  with pytest.raises(ValueError, match='gs://bucket/model is remote'):
    checkpoint.resolve_checkpoint('gs://bucket/model')


def test_does_not_import_jax(tmp_path):
  code = 'import sys, segjax.hf.checkpoint, segjax.hf.hub; print("jax" in sys.modules)'
  ran = subprocess.run(
    [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, check=True
  )
  assert ran.stdout.strip() == 'False'
