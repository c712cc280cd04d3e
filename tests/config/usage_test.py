"""Commands that print and exit: help, settings, metrics, version."""

import importlib
import sys

import pytest

import segjax
from segjax import main
from segjax.config import config_files, parse, settings_table, topics, usage
from segjax.config.choices import CHOICES
from segjax.errors import UserError
from segjax.report import metric_docs


def test_overview_lists_jobs_presets_commands_and_examples():
  text = main.answer(['--help'])
  for config in config_files.shipped_configs():
    assert f'\n  {config.name:<18}' in text
  assert 'presets: demo, demo_long, local, smollm2_135m, smollm2_360m, qwen25_05b,' in text
  assert text.count('\n  segjax ') == 3
  assert all(len(line) <= 105 for line in text.splitlines())


@pytest.mark.parametrize('name', ['ppo', 'reward', 'sft', 'evaluate', 'normalizer'])
def test_presets_of_the_overview_exist(name):
  (config,) = (config for config in config_files.shipped_configs() if config.name == name)
  presets = usage.presets(config)
  assert 'local' in presets
  for preset in presets:
    importlib.import_module(f'configs.{name}').get_config(preset)


def test_help_of_a_job_is_the_docstring_of_its_config():
  assert main.answer(['ppo:local', '--help']) == main.answer(['help', 'ppo'])
  assert main.answer(['help', 'ppo']).startswith('PPO on segment rewards.')


def test_version():
  assert main.answer(['--version']) == f'segjax {segjax.__version__}'


@pytest.mark.parametrize('name', topics.TOPICS)
def test_topics_name_settings_that_exist(name):
  text = main.answer(['help', name])
  keys = set(parse.setting_keys())
  sections = {key.partition('.')[0] for key in keys if '.' in key}
  words = [word.strip('.,;:()').partition('=')[0] for word in text.split()]
  for word in words:
    section, dot, leaf = word.removeprefix('--').removeprefix('config.').partition('.')
    if dot and leaf and section in sections and '/' not in word:
      parse.check_key(f'{section}.{leaf}')
  assert all(len(line) <= 100 for line in text.splitlines())
  assert name in main.answer(['help'])


def test_settings_have_default_comment_and_choices():
  rows = settings_table.all_settings()
  assert sorted(row.key for row in rows) == sorted(parse.setting_keys())
  assert [row.key for row in rows if not row.comment and row.key not in CHOICES] == []
  text = main.answer(['settings'])
  for row in rows:
    assert f'\n  {row.key} ' in text
  assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
  'section, words',
  [
    ('ppo', ['ppo.kl_coef', '0.01', 'one of k1, k2, k3']),
    ('config.ppo.policy_optimizer', ['ppo.policy_optimizer.learning_rate', '5e-07']),
    ('ppo.whiten', ['True', 'variance 1']),
  ],
)
def test_settings_of_a_section(section, words):
  text = ' '.join(main.answer(['settings', section]).split())
  assert all(word in text for word in words)
  assert 'rollout.temperature' not in text


def test_metrics():
  text = main.answer(['metrics'])
  assert all(name in text for entry in metric_docs.ENTRIES for name in entry.names)
  assert main.answer(['metrics', 'objective/kl']).startswith('objective/kl')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['settings', 'ppo.kl_coeff'], 'did you mean config.ppo.kl_coef'),
    (['settings', 'shaping'], 'config.shaping is now config.reward_shaping'),
    (['metrics', 'objective/none'], 'there is no such metric'),
    (['metrics', 'val/loss'], 'metrics val/loss is now critic/loss'),
    (['help', 'packin'], 'there is no such topic; did you mean packing'),
  ],
)
def test_wrong_names_end_in_one_line(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    main.answer(arguments)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'job, argument',
  [('ppo', '--config=configs/ppo.py'), ('ppo:local,token', '--config=configs/ppo.py:local,token')],
)
def test_a_job_is_its_config_file(monkeypatch, job, argument):
  """`segjax ppo --config.ppo.kl_coef=0.1` starts what --config=configs/ppo.py starts."""
  runs = []
  monkeypatch.setattr('sys.argv', ['segjax', job, '--config.ppo.kl_coef=0.1'])
  monkeypatch.setattr(main, 'run', lambda main: runs.append(main))
  monkeypatch.setattr(main, 'hide_unused_plugins', lambda: None)
  main.cli()
  assert sys.argv == ['segjax', argument, '--config.ppo.kl_coef=0.1']
  assert runs == [main.main]


def test_plan_of_a_job(monkeypatch):
  from segjax.plan import cli

  runs = []
  monkeypatch.setattr('sys.argv', ['segjax', 'plan', 'ppo:local', '--topology=cpu:2'])
  monkeypatch.setattr(main, 'run', lambda main: runs.append(main))
  main.cli()
  assert sys.argv == ['segjax', '--config=configs/ppo.py:local', '--topology=cpu:2']
  assert [run_main.func for run_main in runs] == [cli.main]


def test_unknown_job_ends_in_one_line(monkeypatch):
  monkeypatch.setattr('sys.argv', ['segjax', 'ppoo'])
  with pytest.raises(SystemExit, match='segjax: ppoo: there is no such job or command; did you'):
    main.cli()


def test_help_is_printed_with_exit_code_0(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['segjax', '--help'])
  main.cli()
  assert capsys.readouterr().out.startswith('segjax: segment-level RLHF')
