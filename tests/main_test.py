"""The command line: flags, one-line errors, and the whole demo."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segjax import main
from segjax.config import command_line
from segjax.report.metric_log import TooManySkippedStepsError

REPOSITORY = Path(__file__).resolve().parent.parent


def _segjax(*arguments):
  """Runs `python -m segjax.main` on one CPU device, quick to compile, without a hub."""
  quick = '--xla_backend_optimization_level=0'
  environment = os.environ | {'XLA_FLAGS': quick, 'HF_ENDPOINT': 'http://127.0.0.1:9'}
  command = [sys.executable, '-m', 'segjax.main', '--compilation_cache_dir=', *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)


@pytest.mark.parametrize(
  'config, expected',
  [
    ('configs/ppo.py', 'runs/ppo-demo-seed3'),
    ('configs/ppo.py:local', 'runs/ppo-local-seed3'),
    ('/elsewhere/my.py:llama3_8b_sft,token', 'runs/my-llama3_8b_sft-token-seed3'),
    ('configs/chat.py', 'runs/chat-seed3'),
    ('configs/selfcheck.py', 'runs/selfcheck-seed3'),
    ('configs/sft.py', 'runs/sft-demo-seed3'),
    ('/elsewhere/my.py', 'runs/my-seed3'),
  ],
)
def test_default_workdir(config, expected):
  assert main.default_workdir(config, 3) == expected


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ('', 'runs/my-seed3'),
    ('preset', 'runs/my-seed3'),
    ("preset='small'", 'runs/my-small-seed3'),
    ("preset: str = 'small,token'", 'runs/my-small-token-seed3'),
    ('preset=NAME', 'runs/my-seed3'),
  ],
)
def test_default_workdir_of_a_config_of_ones_own(tmp_path, arguments, expected):
  (tmp_path / 'my.py').write_text(f'def get_config({arguments}):\n  pass\n')
  assert main.default_workdir(str(tmp_path / 'my.py'), 3) == expected


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config=configs/ppoo.py'], 'there is no file .configs/ppoo.py'),
    (['--config', 'ppo.py:demo'], '--config=ppo.py:demo: there is no file .ppo.py'),
    (['--config=configs/chat.py:local'], 'has no presets; use --config=configs/chat.py'),
    (['--config=configs/shared/demo_run.py'], r'has no get_config\(\)'),
    (['--config', 'README.md'], 'README.md is not a Python file: '),
    (['--workdir=x', 'local'], "'local' is not a flag; a preset is written JOB:PRESET"),
    (['--config.ppo.kl_coeff=1'], 'did you mean config.ppo.kl_coef'),
    (
      ['--config.seed=1', '--config.sft.batchs=1'],
      r'config.sft.batchs .* mean config.sft.batch_size',
    ),
    (['--config.runtime.remt=none'], 'did you mean config.runtime.remat'),
  ],
)
def test_wrong_flags_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    command_line.parse_flags(['segjax', *arguments])


@pytest.mark.parametrize(
  'arguments, message',
  [
    pytest.param(
      ['--config=configs/ppo.py:demmo'],
      "preset 'demmo': 'demmo' is not one of demo, demo_long, ",
      marks=pytest.mark.processes,
    ),
    (
      ['--config=configs/ppo.py', '--config.ppo.max_steps=1.5'],
      '--config.ppo.max_steps=1.5: invalid lit',
    ),
    pytest.param(
      ['--config=configs/ppo.py', '--workdir=none://b/run'],
      '--workdir=none://b/run cannot be rea',
      marks=pytest.mark.processes,
    ),
    pytest.param(
      [],
      '--config is missing; start with --config=configs/ppo.py',
      marks=pytest.mark.processes,
    ),
  ],
  ids=['preset', 'type', 'bucket', 'nothing'],
)
def test_errors_are_one_line(arguments, message):
  done = _segjax(*arguments)
  assert done.returncode == 1
  assert done.stderr.startswith('segjax: ')
  assert message in done.stderr
  assert done.stderr.count('\n') == 1


def _raised(function):
  try:
    function()
  except Exception as error:
    return error


@pytest.fixture
def unloaded():
  """Forgets the plugins that are loaded or hidden, for the length of a test."""
  cuda = [
    name for v in ('12', '13') for name in (f'jax_cuda{v}_plugin', f'jax_plugins.xla_cuda{v}')
  ]
  names = ['libtpu', *cuda]
  before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
  yield
  for name in names:
    sys.modules.pop(name, None)
  sys.modules.update(before)


@pytest.mark.parametrize(
  'node, platforms, is_loaded',
  [
    (None, '', False),
    (None, 'tpu', True),
    ('accel0', '', True),
    ('vfio/0', '', True),
    ('vfio/vfio', '', False),
  ],
)
def test_libtpu_is_loaded_where_there_is_a_tpu(
  tmp_path, monkeypatch, unloaded, node, platforms, is_loaded
):
  (tmp_path / 'libtpu.py').write_text('')
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  if node:
    (tmp_path / 'dev' / node).parent.mkdir(parents=True)
    (tmp_path / 'dev' / node).touch()
  main.hide_unused_plugins(tmp_path / 'dev')
  assert (importlib.import_module if is_loaded else _is_missing)('libtpu')


@pytest.mark.parametrize(
  'node, platforms, is_loaded',
  [
    (None, '', False),
    (None, 'cpu', False),
    (None, 'cuda,cpu', True),
    ('nvidia0', '', True),
    ('nvidiactl', '', False),
    ('dxg', '', True),
    ('accel0', '', False),
  ],
)
def test_cuda_plugin_is_loaded_where_there_is_a_gpu(
  tmp_path, monkeypatch, unloaded, node, platforms, is_loaded
):
  (tmp_path / 'jax_cuda13_plugin.py').write_text('')
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  (tmp_path / 'dev').mkdir()
  if node:
    (tmp_path / 'dev' / node).touch()
  main.hide_unused_plugins(tmp_path / 'dev')
  assert (importlib.import_module if is_loaded else _is_missing)('jax_cuda13_plugin')
  for name in ('jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13'):
    assert (name in sys.modules) != is_loaded
    # jax calls this of each plugin that is installed.
    assert is_loaded or importlib.import_module(name).initialize() is None


def _is_missing(module):
  with pytest.raises(ModuleNotFoundError):
    importlib.import_module(module)
  return True


@pytest.mark.processes
@pytest.mark.parametrize(
  'command, last',
  [
    (('-m', 'segjax.main', '--config=configs/ppo.py', '--dry_run'), ''),
    (('tools/show_segments.py', '/nowhere', '--text=x'), 'show_segments: no directory'),
    (('tools/convert_hf.py', 'import', '/nowhere', '/nowhere/out'), 'convert_hf.py: no directory'),
  ],
)
def test_a_libtpu_without_a_tpu_is_not_touched(tmp_path, command, last):
  """The whole program with a libtpu that fails when it is imported."""
  (tmp_path / 'libtpu.py').write_text('raise SystemExit("libtpu was imported")')
  # Where a libtpu is installed, jax has set its path for this process and those it starts.
  environment = {
    key: value
    for key, value in os.environ.items()
    if key != 'JAX_PLATFORMS' and not key.startswith('TPU_')
  }
  environment |= {'PYTHONPATH': str(tmp_path), 'XLA_FLAGS': ''}
  flags = ['--compilation_cache_dir=', f'--workdir={tmp_path}/run'] if command[0] == '-m' else []
  done = subprocess.run(
    [sys.executable, *command, *flags],
    capture_output=True, text=True, cwd=REPOSITORY, env=environment,
  )  # fmt: skip
  assert done.stderr.startswith(last) and 'libtpu' not in done.stderr
  assert bool(done.stderr) == bool(done.returncode) == bool(last)


def test_only_errors_for_users_lose_their_traceback():
  assert main.is_user_error(_raised(lambda: command_line.parse_flags(['segjax', '--config.zzz=1'])))
  # An error of the operating system may come from anywhere, as from a user's function.
  assert not main.is_user_error(_raised(lambda: Path('/nowhere/at/all').read_text()))
  assert not main.is_user_error(_raised(lambda: int('x')))

  def fail():
    raise TooManySkippedStepsError('step 3: loss not finite')

  assert main.is_user_error(_raised(fail))


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
  printed = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(printed, encoding='ascii'))
  main.escape_unencodable()
  print('naïve', flush=True)
  assert printed.getvalue() == b'na\\xefve\n'


@pytest.mark.processes
def test_dry_run_of_the_published_recipe_needs_no_network(tmp_path):
  done = _segjax('--config=configs/ppo.py:llama3_8b_sft', '--dry_run', f'--workdir={tmp_path}/w')
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert '4 x 8.03 B' in done.stdout
  assert '--config.policy.path=RLHFlow/LLaMA3-SFT-v2' in done.stdout
  assert not (tmp_path / 'w').exists()


FEW = {
  'demo.sft_rows': 256,
  'demo.pairs': 256,
  'sft.max_steps': 2,
  'reward.max_steps': 2,
  'normalizer.max_pairs': 128,
  'ppo.max_steps': 2,
  'ppo.rollout_batch_size': 16,
  'ppo.minibatch_size': 16,
  'evaluate.samples_per_prompt': 1,
  'evaluate.batch_size': 16,
  'runtime.remat': 'none',
}


def _is_interval(value):
  in_order = value['low'] <= value['mean'] <= value['high']
  return in_order and list(value) == ['mean', 'low', 'high', 'n']


@pytest.mark.campaign
def test_demo_from_nothing(tmp_path):
  few = [f'--config.{key}={value}' for key, value in FEW.items()]
  done = _segjax('--config=configs/ppo.py', f'--workdir={tmp_path}', *few)
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''  # no warning, no log line
  lines = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
  lines = [line for line in lines if ' warning: ' not in line]  # sentences, whole for grep
  assert all(len(line) <= 100 for line in lines if ' step ' not in line)
  assert all(len(line) <= 130 for line in lines)
  for number, stage in enumerate(('demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate'), 1):
    assert f'\nstage {number} of 6: {stage}' in done.stdout
    assert f'{stage:<12}done in' in done.stdout
    last = 'step 2 of 2: ' if stage in ('sft', 'ppo') else '100%|'  # reward has a bar too
    assert f'{stage:<12}{last}' in done.stdout
  assert re.search(r'\nGold reward on held-out prompts .* from ', done.stdout)
  assert f'in total; the report is {tmp_path}/report.html' in done.stdout.splitlines()[-1]
  results = json.loads((tmp_path / 'results.json').read_text())
  assert list(results) == [
    *('seed', 'wall_seconds', 'gold', 'kl_nats', 'eos_rate', 'length', 'segments'),
    *('boundary_f1', 'reward_accuracy'),
  ]
  assert results['seed'] == 0
  assert results['wall_seconds'] > 0
  for key in ('gold', 'eos_rate', 'length', 'segments'):
    assert set(results[key]) == {'before', 'after'}
  assert _is_interval(results['gold']['before']) and _is_interval(results['gold']['after'])
  assert isinstance(results['kl_nats'], float)
  assert 0 <= results['boundary_f1'] <= 1
  accuracy = results['reward_accuracy']
  assert set(accuracy) == {'held_out', 'best_possible'}
  assert 0.5 < accuracy['best_possible'] <= 1
  record = json.loads((tmp_path / 'config.json').read_text())
  assert list(record) == ['demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate']
  assert record['ppo']['config']['ppo']['max_steps'] == 2
  _check_cards(tmp_path, few)


def _check_cards(workdir, few):
  """Every trained model has a card that the hub can parse, and a record of its run."""
  import huggingface_hub

  for model, curve in (
    *(('sft/model', 'loss'), ('reward/model', 'accuracy')),
    *(('ppo/model', 'kl'), ('ppo/critic', 'kl')),
  ):
    directory = workdir / model
    record = json.loads((directory / 'segjax_config.json').read_text())
    stage = model.partition('/')[0]
    assert (record['stage'], record['recipe']) == (stage, 'configs/ppo.py')
    command = 'python -m segjax.main --compilation_cache_dir= --config=configs/'
    assert record['command'].startswith(command)
    assert record['command'].endswith(few[-1])
    assert record['settings'][stage]['max_steps'] == 2
    assert 0 < record['data']['used'] <= record['data']['rows']
    assert any(curve in name for name in record['metrics'])
    assert (directory / 'curves.png').read_bytes().startswith(b'\x89PNG')
    card = huggingface_hub.ModelCard.load(directory / 'README.md')
    assert card.data.stage == stage and card.data.eval_results
    assert '](curves.png)' in card.text and record['command'] in card.text
