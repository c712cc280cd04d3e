import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from segjax.hf import headers

REPOSITORY = Path(__file__).resolve().parents[2]


def _save(directory, name='model.safetensors', **tensors):
  directory.mkdir(exist_ok=True)
  tensors = tensors or {'a': np.zeros((2, 3), np.float32), 'b': np.zeros(4, np.float16)}
  safetensors.numpy.save_file(tensors, directory / name)
  return directory


def _index(directory, weight_map):
  (directory / headers.INDEX).write_text(json.dumps({'weight_map': weight_map}))
  return directory


def test_reads_names_shapes_dtypes_and_offsets(tmp_path):
  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  _save(tmp_path, a=values, b=np.zeros(4, np.float16))
  checkpoint = headers.open_checkpoint(tmp_path)
  assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == {
    'a': ('F32', (2, 3)),
    'b': ('F16', (4,)),
  }
  assert checkpoint.num_parameters() == 10
  tensor = checkpoint.tensors['a']
  found = np.fromfile(tensor.file, np.float32, tensor.size, offset=tensor.offset)
  np.testing.assert_array_equal(found.reshape(tensor.shape), values)


def test_reads_shards(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _save(tmp_path, 'two.safetensors', b=np.zeros(3, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  assert headers.open_checkpoint(tmp_path).num_parameters() == 5


def test_refuses_missing_shard(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  with pytest.raises(ValueError, match=r'two\.safetensors is missing.*1 tensors there.*first b'):
    headers.open_checkpoint(tmp_path)


def test_refuses_index_that_disagrees(tmp_path):
  _save(tmp_path, 'one.safetensors', a=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'one.safetensors'})
  with pytest.raises(ValueError, match='tensor b is not in it'):
    headers.open_checkpoint(tmp_path)
  _save(tmp_path, 'two.safetensors', a=np.zeros(2, np.float32), b=np.zeros(2, np.float32))
  _index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  with pytest.raises(ValueError, match='tensor a is in another shard too'):
    headers.open_checkpoint(tmp_path)
  _index(tmp_path, {})
  with pytest.raises(ValueError, match='no "weight_map"'):
    headers.open_checkpoint(tmp_path)


def test_refuses_pickles_and_says_how_to_convert(tmp_path):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'pytorch_model\.bin is a pickle.*save_pretrained'):
    headers.open_checkpoint(tmp_path)


def test_refuses_directory_without_weights(tmp_path):
  (tmp_path / 'adapter_model.safetensors').write_bytes(b'')
  with pytest.raises(ValueError, match=r'it holds adapter_model\.safetensors'):
    headers.open_checkpoint(tmp_path)


def test_refuses_what_is_no_safetensors_file(tmp_path):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(ValueError, match='but a git-lfs pointer'):
    headers.open_checkpoint(tmp_path)
  file.write_bytes(b'')
  with pytest.raises(ValueError, match=r'\(0 bytes\) is no safetensors file'):
    headers.open_checkpoint(tmp_path)
  file.write_bytes(b'\x04' + b'\0' * 7 + b'nope')
  with pytest.raises(ValueError, match='broken header'):
    headers.open_checkpoint(tmp_path)


def test_refuses_truncated_file(tmp_path):
  file = _save(tmp_path) / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match='truncated or damaged at tensor'):
    headers.open_checkpoint(tmp_path)


def test_refuses_integer_weights(tmp_path):
  _save(tmp_path, a=np.zeros(2, np.int8))
  with pytest.raises(ValueError, match=r'tensor a has dtype I8.*quantized'):
    headers.open_checkpoint(tmp_path)


def test_refuses_broken_config(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json does not exist'):
    headers.read_json(tmp_path / 'config.json')
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='not valid JSON'):
    headers.read_json(tmp_path / 'config.json')
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match='a JSON list'):
    headers.read_json(tmp_path / 'config.json')


@pytest.mark.parametrize(
  'name', ['./nothing/here', '/nothing/here', '~/nothing', 'a/b/c', 'nothing', '../x/', 'a/b/']
)
def test_missing_directory_is_not_looked_up(name, monkeypatch):
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', None)
  with pytest.raises(ValueError, match=f'no directory {name}'):
    headers.resolve(name)


def test_resolves_directory_and_refuses_file(tmp_path):
  assert headers.resolve(str(tmp_path)) == tmp_path
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is a file'):
    headers.resolve(tmp_path / 'file')
  with pytest.raises(ValueError, match='no directory'):
    headers.resolve(tmp_path / 'missing')
  with pytest.raises(ValueError, match='gs://bucket/model is remote'):
    headers.resolve('gs://bucket/model')


def test_hub_id_is_downloaded(tmp_path, monkeypatch):
  asked = {}

  def download(name, **patterns):
    asked.update(patterns, name=name)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert headers.resolve('owner/name') == tmp_path
  assert asked['name'] == 'owner/name'
  assert '*.safetensors' in asked['allow_patterns']


def test_unreachable_hub_is_one_clear_error(monkeypatch):
  def download(name, **patterns):
    raise huggingface_hub.errors.LocalEntryNotFoundError('no connection\nand more')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  with pytest.raises(ValueError, match=r'owner/name is neither .*no connection.*network'):
    headers.resolve('owner/name')


def test_does_not_import_jax(tmp_path):
  code = 'import sys, segjax.hf.headers, segjax.hf.convert; print("jax" in sys.modules)'
  ran = subprocess.run(
    [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, check=True
  )
  assert ran.stdout.strip() == 'False'
