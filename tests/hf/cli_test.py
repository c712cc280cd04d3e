"""The command line of the conversions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from segjax import main as segjax_main
from segjax.hf import cli, convert, imported

REPOSITORY = Path(__file__).resolve().parents[2]


def _tool(*arguments):
  paths = [str(REPOSITORY), os.environ.get('PYTHONPATH', '')]
  return subprocess.run(
    [sys.executable, '-X', 'importtime', REPOSITORY / 'tools' / 'convert_hf.py', *arguments],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))},
    capture_output=True,
    text=True,
  )


def test_roles_are_those_of_the_conversion():
  assert tuple(imported.HEADS) == cli.ROLES


def test_import_then_export(llama3, tmp_path, capsys):
  stored, out = str(tmp_path / 'b'), str(tmp_path / 'c')
  (tmp_path / 'results.json').write_text('{"gold": {"after": 0.5}, "wall": 3, "name": "x"}')
  assert cli.main(['import', str(llama3), stored, '--role=critic', '--seed=3']) == 0
  assert json.loads((tmp_path / 'b' / 'segjax.json').read_text())['role'] == 'critic'
  metrics = ['--metrics', str(tmp_path / 'results.json'), 'kl=11.5', '--license=llama3']
  card = ['--stage=ppo', '--recipe=mine', '--base_model=owner/name', '--dataset=held out']
  flags = ['--max_shard_size=20KB', '--dtype=bfloat16', *metrics, *card]
  assert cli.main(['export', stored, out, *flags]) == 0
  assert capsys.readouterr().out.startswith(f'imported {stored}: 0.00 GB in ')
  assert len(list((tmp_path / 'c').glob('*.safetensors'))) > 1
  data = huggingface_hub.ModelCard.load(tmp_path / 'c' / 'README.md').data
  assert (data.base_model, data.license, data.stage) == ('owner/name', 'llama3', 'ppo')
  values = {result.metric_type: result.metric_value for result in data.eval_results}
  assert values == {'gold/after': 0.5, 'wall': 3.0, 'kl': 11.5}


def test_verify(llama3, tmp_path, capsys):
  stored = str(convert.import_checkpoint(llama3, tmp_path / 'b'))
  ids = ['--ids', '1,5,9', '7']
  assert cli.main(['verify', str(llama3), stored, *ids]) == 0
  assert 'passed' in capsys.readouterr().out
  assert cli.main(['verify', str(llama3), *ids, '--tolerance=1e-12']) == 1
  assert 'FAILED' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['inspect', 'NOWHERE'], 'no directory'),
    (['import', 'NOWHERE', 'OUT'], 'no directory'),
    (['import', 'HF', 'HF'], 'is also the source'),
    (['import', 'HF', 'OUT', '--dtype=int4'], "dtype='int4' is not one of"),
    (['export', 'HF', 'OUT'], 'has no segjax.json'),
    (['export', 'HF', 'OUT', '--max_shard_size=big'], "'big' is not a size; use 5GB"),
    (['export', 'HF', 'OUT', '--metrics', 'kl=x'], 'is not a number'),
    (['export', 'HF', 'OUT', '--metrics', 'NOWHERE'], 'does not exist'),
  ],
)
def test_errors_are_one_line_and_exit_1(arguments, message, llama3, tmp_path, capsys):
  names = {'HF': str(llama3), 'OUT': str(tmp_path / 'out'), 'NOWHERE': './nowhere'}
  assert cli.main([names.get(a, a) for a in arguments]) == 1
  err = capsys.readouterr().err
  assert err.startswith('segjax convert: ') and message in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_wrong_usage_exits_2(capsys):
  for arguments in ([], ['import'], ['translate', 'a'], ['import', 'a', 'b', '--role=teacher']):
    with pytest.raises(SystemExit) as caught:
      cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
  ('text', 'expected'),
  [('5GB', 5 * 10**9), ('500 mb', 5 * 10**8), ('2GiB', 2**31), ('1000', 1000), ('0.5KB', 500)],
)
def test_size(text, expected):
  assert cli.parse_size(text) == expected


@pytest.mark.parametrize('text', ['', 'GB', '5XB', '0', '-1GB', '1.2.3GB'])
def test_invalid_size(text):
  with pytest.raises(ValueError, match='is not a size'):
    cli.parse_size(text)


def test_inspect_needs_no_jax(sharded_llama31):
  ran = _tool('inspect', sharded_llama31)
  assert ran.returncode == 0, ran.stderr
  assert 'model.layers.1.self_attn.k_proj.weight' in ran.stdout
  imported = {line.rpartition('|')[2].strip() for line in ran.stderr.splitlines()}
  assert 'segjax.hf.checkpoint' in imported
  assert not {'jax', 'torch', 'transformers', 'orbax', 'tensorstore'} & imported


def test_the_tool_exits_1_in_one_line(tmp_path):
  ran = _tool('inspect', tmp_path)
  assert ran.returncode == 1
  assert ran.stderr.splitlines()[-1].startswith('convert_hf.py: ')
  assert 'Traceback' not in ran.stderr


def test_segjax_convert(llama3, tmp_path, monkeypatch, capsys):
  for arguments, code in ((['inspect', str(llama3)], 0), (['inspect', str(tmp_path)], 1)):
    monkeypatch.setattr(sys, 'argv', ['segjax', 'convert', *arguments])
    with pytest.raises(SystemExit) as caught:
      segjax_main.cli()
    assert caught.value.code == code
  assert 'model.embed_tokens.weight' in capsys.readouterr().out
