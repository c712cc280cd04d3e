import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf import tiny
from segjax.hf import convert, reader

REPOSITORY = Path(__file__).resolve().parents[2]


def _tool(*arguments):
  paths = [str(REPOSITORY), os.environ.get('PYTHONPATH', '')]
  return subprocess.run(
    [sys.executable, '-X', 'importtime', REPOSITORY / 'tools' / 'convert_hf.py', *arguments],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  ('kind', 'head', 'dtype'),
  [
    ('llama31', 'language', 'bfloat16'),
    ('llama32', 'language', 'float32'),
    ('biases', 'scalar', 'float32'),
  ],
)
def test_import_then_export_is_bit_equal(kind, head, dtype, tmp_path):
  source = tiny.write(tmp_path / 'a', kind, head, dtype)
  (source / 'tokenizer.json').write_bytes(b'{}\r\n')
  stored = convert.import_checkpoint(source, tmp_path / 'b', head=head)
  out = convert.export_checkpoint(stored, tmp_path / 'c')
  tiny.assert_same_tensors(source, out)
  assert (out / 'tokenizer.json').read_bytes() == b'{}\r\n'
  assert reader.load_config(out) == reader.load_config(source)
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b', 'c']


def test_import_draws_a_scalar_head_by_seed(tmp_path):
  source = tiny.write(tmp_path / 'a')
  made = []
  for name, seed in (('b', 1), ('c', 1), ('d', 2)):
    stored = convert.import_checkpoint(source, tmp_path / name, head='scalar', seed=seed)
    made.append(tiny.tensors(convert.export_checkpoint(stored, tmp_path / (name + name))))
  assert (made[0]['score.weight'] == made[1]['score.weight']).all()
  assert (made[0]['score.weight'] != made[2]['score.weight']).any()


def test_refuses(tmp_path):
  source = tiny.write(tmp_path / 'a')
  with pytest.raises(ValueError, match='exists; name a new directory'):
    convert.import_checkpoint(source, tmp_path)
  with pytest.raises(ValueError, match=r'segjax\.json does not exist'):
    convert.export_checkpoint(source, tmp_path / 'b')
  (source / 'segjax.json').write_text(json.dumps({'head': 'language'}))
  with pytest.raises(ValueError, match='not an imported checkpoint'):
    convert.export_checkpoint(source, tmp_path / 'b')


def test_tool_inspects_without_jax(tmp_path):
  source = tiny.write(tmp_path, 'llama31', max_shard_size='20KB')
  ran = _tool('inspect', source)
  assert ran.returncode == 0, ran.stderr
  assert 'model.layers.1.self_attn.k_proj.weight' in ran.stdout
  assert 'F32   [16, 32]' in ran.stdout
  count = reader.open_checkpoint(source).num_parameters()
  assert f'{count:,} parameters in 21 tensors' in ran.stdout
  assert 'rope llama3, theta 500000' in ran.stdout
  imported = {line.rpartition('|')[2].strip() for line in ran.stderr.splitlines()}
  assert 'segjax.hf.headers' in imported
  assert not {'jax', 'torch', 'transformers'} & imported


def test_tool_reports_one_line(tmp_path):
  ran = _tool('inspect', tmp_path)
  assert ran.returncode == 1
  assert ran.stderr.splitlines()[-1].startswith('error: ')
  assert 'Traceback' not in ran.stderr
