import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import hf_models

from segjax.hf import checkpoint
from segjax.hf.inspect import inspect

REPOSITORY = Path(__file__).resolve().parents[2]


def test_language_model(tmp_path):
  source = hf_models.write(tmp_path, 'llama31', dtype='bfloat16', max_shard_size='20KB')
  (source / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 3]}))
  lines = inspect(source).splitlines()
  opened = checkpoint.open_checkpoint(source)
  for line, (name, tensor) in zip(lines, opened.tensors.items(), strict=False):
    assert line.split(maxsplit=2) == [name, tensor.dtype, str(list(tensor.shape))]
  rows = dict(line.split('  ', 1) for line in lines[len(opened.tensors) + 1 :])
  rows = {name.strip(): row.strip() for name, row in rows.items()}
  assert rows['model'] == 'llama (LlamaForCausalLM)'
  assert rows['rope'].startswith('llama3, theta 500000, ')
  assert 'original_max_position_embeddings 16' in rows['rope']
  assert rows['embeddings'] == 'untied'
  assert rows['special ids'] == 'bos 1, eos 2 (generation_config.json: 2 3), pad 0'
  count = opened.num_parameters()
  assert rows['weights'].startswith(f'{count:,} parameters in 21 tensors, ')
  assert f'(BF16 {count:,})' in rows['weights']
  assert 'scores' not in rows


def test_reward_model(tmp_path):
  source = hf_models.write(tmp_path, 'llama32', 'scalar')
  raw = json.loads((source / 'config.json').read_text())
  raw |= {'architectures': ['RewardModel'], 'value_head_prefix': 'score', 'mean': 0.2, 'std': 4.3}
  (source / 'config.json').write_text(json.dumps(raw))
  (source / 'segment_reward.json').write_text('{}')
  text = inspect(source)
  assert 'llama (RewardModel)' in text
  assert 'value_head_prefix score, mean 0.2, std 4.3' in text
  assert 'segment_reward.json' in text
  assert 'F32   [1, 32]' in text


def test_reads_headers_alone(tmp_path):
  # 126 layers of 405B in sparse files of 0.5 TB: reading the data would take minutes.
  raw = {'model_type': 'llama', 'rope_theta': 5e5}
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  weight_map, shapes = {}, {'q': [16384, 16384], 'up': [53248, 16384], 'down': [16384, 53248]}
  for layer in range(126):
    file, header, end = f'model-{layer}.safetensors', {}, 0
    for name, shape in shapes.items():
      begin, end = end, end + 2 * shape[0] * shape[1]
      header[f'{layer}.{name}'] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [begin, end]}
      weight_map[f'{layer}.{name}'] = file
    text = json.dumps(header).encode()
    with (tmp_path / file).open('wb') as stream:
      stream.write(len(text).to_bytes(8, 'little') + text)
      stream.truncate(8 + len(text) + end)
  (tmp_path / checkpoint.INDEX).write_text(json.dumps({'weight_map': weight_map}))
  text = inspect(tmp_path)
  assert '378 tensors, 126 files, 507' in text


def test_does_not_import_jax(llama3):
  code = (
    'import sys; from segjax.hf.inspect import inspect; inspect(sys.argv[1]);'
    'print(sorted({"jax", "torch", "transformers", "orbax", "flax"} & set(sys.modules)))'
  )
  ran = subprocess.run(
    [sys.executable, '-c', code, llama3],
    cwd=REPOSITORY,
    env=os.environ,
    capture_output=True,
    text=True,
    check=True,
  )
  assert ran.stdout.strip() == '[]'


def test_refuses_a_directory_without_checkpoint(tmp_path):
  with pytest.raises(ValueError, match=r'has neither model\.safetensors'):
    inspect(tmp_path)
