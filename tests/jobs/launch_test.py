"""`segjax.train`: jobs from Python, by preset, file or values, also outside the main thread."""

import concurrent.futures
import sys
import types

import pytest
from fixtures import runs
from ml_collections import ConfigDict

import segjax
from segjax.config import presets
from segjax.config.load import load_settings
from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.jobs import launch
from segjax.run import preemption, source_code


def test_settings_come_from_a_preset_a_file_or_values(tmp_path):
  settings, name = load_settings('ppo:demo', {'ppo.max_steps': 3, 'rollout': {'top_k': 2}})
  assert name == 'configs/ppo.py:demo' and settings.stages[-1] == 'evaluate'
  assert (settings.ppo.max_steps, settings.rollout.top_k) == (3, 2)
  assert load_settings('configs/ppo.py:demo', {})[0].ppo.rollout_batch_size == 256
  own = tmp_path / 'mine.py'
  own.write_text(
    'from segjax.config import presets\n'
    'def get_config():\n'
    '  config = presets.default_config()\n'
    "  config.stages = ('sft',)\n"
    '  return config\n'
  )
  assert load_settings(own, {})[0].stages == ('sft',)
  config = presets.default_config()
  config.stages, config.ppo.max_steps = ('ppo',), 7
  assert load_settings(config, {'seed': 5})[0].ppo.max_steps == 7
  for values in (
    {'ppo': {'kl_coef': 0.5}},
    {'ppo.kl_coef': 0.5},
    ConfigDict({'ppo': {'kl_coef': 0.5}}),
  ):
    settings, _ = load_settings(values, {'stages': ('ppo',)})
    assert settings.ppo.kl_coef == 0.5 and settings.stages == ('ppo',)


def test_a_directory_in_the_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert launch._open_workdir('~/run', Settings(), '')[0] == tmp_path / 'run'
  with pytest.raises(UserError, match=r'--workdir=.* cannot be looked up'):
    launch._open_workdir('~no-such-user/run', Settings(), '')


@pytest.mark.parametrize(
  'config, overrides, message',
  [
    ('ppoo:demo', {}, 'ppoo: there is no such job or command; did you mean ppo'),
    ('ppo:demmo', {}, "preset 'demmo': 'demmo' is not one of"),
    ('nowhere/ppo.py', {}, 'there is no file'),
    (f'{"a" * 300}.py', {}, 'there is no file'),
    ({}, {'ppo.kl_coeff': 1.0}, 'config.ppo.kl_coeff does not exist; did you mean'),
    ({'ppo.max_steps': 'x'}, {}, "config.ppo.max_steps='x' must be of type int"),
    ({'ppo': 3}, {}, 'config.ppo=3 must be a section'),
  ],
)
def test_wrong_configs_name_the_key(config, overrides, message):
  with pytest.raises(UserError, match=message):
    load_settings(config, overrides)


@pytest.mark.campaign
def test_runs_jobs_outside_the_main_thread(tmp_path, capsys):
  config = {'stages': ('demo', 'sft'), **runs.SIZES}
  config |= {
    'sft.batch_size': 8,
    'sft.max_steps': 2,
    'data.max_length': 96,
    'data.max_prompt_length': 32,
  }
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    call = pool.submit(segjax.train, config, tmp_path, mesh=runs.one_device())
    results = call.result()
  assert results['sft']['steps'] == 2
  assert (tmp_path / 'sft' / 'model' / 'model.safetensors').exists()
  assert (tmp_path / 'report.html').exists()
  assert 'sft         done in' in capsys.readouterr().out
  again = launch.train(config, str(tmp_path), mesh=runs.one_device())
  assert again['sft'] == results['sft']
  assert 'reused' in capsys.readouterr().out


def test_a_function_of_a_notebook_is_part_of_the_key(monkeypatch):
  main = types.ModuleType('__main__')
  main.reward, main.built_in = notebook_reward, len
  monkeypatch.setitem(sys.modules, '__main__', main)
  assert len(source_code.hash_function('__main__:reward')) == 64
  assert source_code.hash_function('__main__:built_in') == ''
  assert source_code.hash_function('__main__:absent') == ''


def notebook_reward(prompt, response):
  return 1.0


def test_a_second_interrupt_does_not_end_a_notebook():
  with preemption.as_guest(), preemption.handle_signals(lambda text: None):
    preemption.signal.raise_signal(preemption.signal.SIGINT)
    assert preemption.stop_requested()
    with pytest.raises(KeyboardInterrupt):
      preemption.signal.raise_signal(preemption.signal.SIGINT)


def test_models_have_a_short_repr(tmp_path):
  policy = segjax.load_policy(str(runs.policy(tmp_path)), mesh=runs.one_device())
  text = repr(policy)
  assert text.startswith('Policy(') and '1 layers, 128 positions, float32, 1 x cpu' in text
  assert len(text) < 120
