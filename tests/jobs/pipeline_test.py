"""The wiring of stages, the checks before the first one starts, and the reuse of results."""

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path

import jax
import pytest

from segjax.config.settings import replace
from segjax.errors import UserError
from segjax.jobs import pipeline
from segjax.jobs.registry import JOBS
from segjax.model.mesh import make_mesh
from segjax.report import stage_history
from segjax.run import remote_inputs, source_code

WORKDIR = Path('/w')


def _paths(settings, name):
  s = pipeline.connect_stage(JOBS[name], settings, WORKDIR)
  return s.policy.path, s.reference.path, s.reward_model.path, s.data.path.removeprefix('/w/')


def test_demo_wires_every_stage_to_the_one_before(small):
  s = small(*JOBS)
  demo, sft, reward = '/w/demo/model', '/w/sft/model', '/w/reward/model'
  rows = 'demo/rows/{}.jsonl.gz'.format
  # Keys that a job does not read keep the config's value: here, empty.
  assert _paths(s, 'sft') == (demo, '', '', rows('sft'))
  assert _paths(s, 'reward') == (sft, sft, '', rows('pairs'))
  assert _paths(s, 'normalizer') == ('', sft, reward, rows('pairs'))
  assert _paths(s, 'ppo') == (sft, sft, reward, rows('prompts'))
  assert _paths(s, 'evaluate') == ('/w/ppo/model', sft, reward, rows('held_out'))


def test_a_local_run_starts_from_the_paths_of_the_config(small):
  s = small('sft', 'reward', 'ppo', 'evaluate', **{'policy.path': 'base', 'data.path': 'rows'})
  assert _paths(s, 'sft')[0] == 'base'
  assert _paths(s, 'reward') == ('/w/sft/model', '/w/sft/model', '', 'rows')
  assert _paths(s, 'ppo') == ('/w/sft/model', '/w/sft/model', '/w/reward/model', 'rows')
  assert _paths(s, 'evaluate')[:2] == ('/w/ppo/model', '/w/sft/model')
  s = small('sft', 'dpo', 'evaluate', **{'policy.path': 'base', 'data.path': 'rows'})
  assert _paths(s, 'evaluate')[:2] == ('/w/dpo/model', '/w/sft/model')


def test_one_job_reads_what_the_config_names(small):
  overrides = {'policy.path': 'p', 'reward_model.path': 'r', 'data.path': 'd'}
  assert _paths(small('ppo', **overrides), 'ppo') == ('p', 'p', 'r', 'd')
  named = small('ppo', **overrides, **{'reference.path': 'f'})
  assert _paths(named, 'ppo') == ('p', 'f', 'r', 'd')
  # Alone, evaluate compares only with a reference that the config names.
  assert _paths(small('evaluate', **overrides), 'evaluate') == ('p', '', 'r', 'd')


@pytest.mark.parametrize(
  'stages, overrides, message',
  [
    (('sft',), {'policy.path': '/nowhere'}, "config.policy.path='/nowhere' does not exist"),
    (('sft',), {'policy.path': 'a/b/c'}, "config.policy.path='a/b/c' does not exist"),
    (('ppo',), {'critic.init': 'reference'}, "config.critic.init='reference' does not exist"),
    (('sft',), {'data.path': 'rows.jsonl'}, "config.data.path='rows.jsonl'"),
    (('answers',), {'policy.path': '/nowhere'}, "config.policy.path='/nowhere' does not exist"),
    (
      ('evaluate_reward',),
      {'evaluate_reward.pairs': 'a/b, /nowhere'},
      r"config.evaluate_reward.pairs\[1\]='/nowhere' does not exist",
    ),
    (('evaluate_reward',), {'evaluate_reward.spans': '/no'}, 'config.evaluate_reward.spans='),
    (
      ('evaluate',),
      {'evaluate.gold_reward_fn': 'segjax.rl:nothing'},
      "config.evaluate.gold_reward_fn='segjax.rl:not",
    ),
    (('evaluate',), {'evaluate.gold_reward_fn': 'no_such_module:f'}, "give 'module:function'"),
    (('evaluate',), {'evaluate.boundary_fn': 'nonsense'}, 'config.evaluate.boundary_fn'),
  ],
)
def test_wrong_paths_and_functions_stop_before_anything_starts(
  small, one_device, stages, overrides, message
):
  with pytest.raises(ValueError, match=message):
    pipeline.prepare(small(*stages, **overrides), WORKDIR, one_device)


@pytest.mark.parametrize(
  'stage, key, size, message',
  [
    (
      'sft',
      'sft.batch_size',
      6,
      'config.sft.batch_size=6 does not divide over the 4 devices .* use 4 or 8',
    ),
    ('reward', 'reward.batch_size', 2, 'config.reward.batch_size=2 .* use 4'),
    ('normalizer', 'normalizer.batch_size', 9, 'use 8 or 12'),
    ('ppo', 'ppo.minibatch_size', 2, 'config.ppo.minibatch_size=2'),
    ('evaluate', 'evaluate.batch_size', 5, 'use 4 or 8'),
    ('evaluate_reward', 'evaluate_reward.batch_size', 5, 'use 4 or 8'),
    ('answers', 'answers.batch_size', 5, 'use 4 or 8'),
  ],
)
def test_batch_that_does_not_divide_over_the_mesh(small, stage, key, size, message):
  mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
  with pytest.raises(ValueError, match=message):
    pipeline.prepare(small(stage, **{key: size}), WORKDIR, mesh)


def test_later_stages_are_checked_before_the_first(small):
  mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
  with pytest.raises(ValueError, match=r'config.evaluate.batch_size=5'):
    pipeline.prepare(small(*JOBS, **{'evaluate.batch_size': 5}), WORKDIR, mesh)


@pytest.mark.parametrize(
  'stages, missing',
  [
    (('sft',), ['policy.path', 'data.path']),
    (('normalizer',), ['reward_model.path', 'reference.path', 'data.path']),
    (('ppo',), ['policy.path', 'reward_model.path', 'data.path']),
    (('evaluate',), ['policy.path', 'reference.path', 'reward_model.path', 'data.path']),
    (('evaluate_reward',), ['reward_model.path', 'data.path']),
    (('answers',), ['policy.path', 'data.path']),
    (tuple(JOBS), []),
  ],
)
def test_missing_paths_are_named(small, one_device, stages, missing):
  prepared = pipeline.prepare(small(*stages), WORKDIR, one_device)
  assert [key for stage in prepared for key in pipeline.missing_keys(stage)] == missing
  if missing:
    with pytest.raises(ValueError, match=f'config.{missing[0]} is empty, and the {stages[0]} job'):
      pipeline.check_complete(prepared)


def test_input_inside_of_the_output_is_refused(small, one_device, tmp_path):
  (tmp_path / 'ppo' / 'model').mkdir(parents=True)
  s = small('ppo', **{'policy.path': str(tmp_path / 'ppo' / 'model')})
  with pytest.raises(ValueError, match=r'lies in .*ppo, which this run writes'):
    pipeline.prepare(s, tmp_path, one_device)


def test_missing_wandb_is_an_error_before_the_run(small, one_device, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"pip install -e '.\[wandb\]'"):
    pipeline.prepare(small('demo', wandb_project='x'), WORKDIR, one_device)


def test_wandb_without_a_key_is_an_error_before_the_run(small, one_device, monkeypatch):
  class Error(Exception):
    pass

  def login():
    raise Error('No API key configured.')

  module = types.ModuleType('wandb')
  module.__spec__, module.Error, module.login = types.SimpleNamespace(), Error, login
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  with pytest.raises(UserError, match=r'No API key configured; .* WANDB_MODE=offline'):
    pipeline.prepare(small('demo', wandb_project='x'), WORKDIR, one_device)


@pytest.fixture
def counted(fake_jobs):
  """Fake jobs that write a file as their model; the fixture lists the names of those that ran."""
  ran = []

  def job(stage):
    ran.append(stage.name)
    stage.model_directory.mkdir(exist_ok=True)
    (stage.model_directory / 'weights').write_text(str(stage.settings.sft.max_steps))
    return {'loss': 1.0}

  fake_jobs(sft=job, reward=job, normalizer=job, ppo=job)
  return ran


@pytest.fixture
def inputs(tmp_path):
  """Paths of a policy and of rows, each a file of one word."""
  (tmp_path / 'base').mkdir()
  (tmp_path / 'base' / 'weights').write_text('base')
  (tmp_path / 'rows.jsonl').write_text('rows')
  return {'policy.path': str(tmp_path / 'base'), 'data.path': str(tmp_path / 'rows.jsonl')}


def test_second_run_reuses_and_logs_it(small, run, counted, inputs, tmp_path, capsys):
  s = small('sft', 'reward', **inputs)
  first = run(s, tmp_path / 'w')
  capsys.readouterr()
  assert run(s, tmp_path / 'w') == first
  assert counted == ['sft', 'reward']
  out = capsys.readouterr().out
  assert out.count('reused from') == 2


def test_settings_without_effect_on_results_rerun_nothing(small, run, counted, inputs, tmp_path):
  s = small('sft', **inputs)
  run(s, tmp_path / 'w')
  same = {
    'checkpoint.every_steps': 1,
    'max_skipped_steps': 9,
    'reward.max_steps': 7,
    'evaluate.num_printed': 0,
  }
  run(replace(s, **same), tmp_path / 'w')
  assert counted == ['sft']


def test_changed_setting_reruns_its_stage_and_those_that_read_its_output(
  small, run, counted, inputs, tmp_path, capsys
):
  s = small('sft', 'reward', **inputs)
  run(s, tmp_path / 'w')
  run(replace(s, **{'reward.max_steps': 3}), tmp_path / 'w')
  assert counted == ['sft', 'reward', 'reward']
  assert 'reward.max_steps changed' in capsys.readouterr().out
  run(replace(s, **{'reward.max_steps': 3, 'sft.max_steps': 3}), tmp_path / 'w')
  assert counted[3:] == ['sft', 'reward']
  assert 'content of policy.path' in capsys.readouterr().out


@pytest.mark.parametrize('file', ['rows.jsonl', 'base/weights', 'template.jinja'])
def test_changed_input_reruns(small, run, counted, inputs, tmp_path, file):
  template = tmp_path / 'template.jinja'
  template.write_text('{{ messages }}')
  s = small('sft', **inputs, **{'data.chat_template': str(template)})
  run(s, tmp_path / 'w')
  (tmp_path / file).write_text('other')
  run(s, tmp_path / 'w')
  assert counted == ['sft', 'sft']


def test_changed_output_reruns(small, run, counted, inputs, tmp_path):
  s = small('sft', **inputs)
  run(s, tmp_path / 'w')
  (tmp_path / 'w' / 'sft' / 'model' / 'weights').write_text('other')
  run(s, tmp_path / 'w')
  assert counted == ['sft', 'sft']


def test_files_that_describe_a_model_rerun_nothing(small, run, fake_jobs, inputs, tmp_path):
  """Cards contain times, paths and commits, and may be edited."""
  ran = []

  def job(stage):
    ran.append(stage.name)
    stage.model_directory.mkdir(exist_ok=True)
    (stage.model_directory / 'weights').write_text('same')
    for name in ('README.md', 'segjax_config.json', 'curves.png'):
      (stage.model_directory / name).write_text(f'run {len(ran)}')
    return {}

  fake_jobs(sft=job, reward=job)
  s = small('sft', 'reward', **inputs)
  run(s, tmp_path / 'w')
  assert ran == ['sft', 'reward']
  model = tmp_path / 'w' / 'sft' / 'model'
  (model / 'README.md').write_text('edited')
  (model / 'curves.png').unlink()
  run(s, tmp_path / 'w')
  assert ran == ['sft', 'reward']
  (tmp_path / 'w' / 'sft' / 'stage.json').unlink()
  run(s, tmp_path / 'w')
  assert ran == ['sft', 'reward', 'sft']  # another card, and the reward stage is reused
  assert (model / 'README.md').read_text() == 'run 3'


def test_checkpoints_of_a_finished_stage_are_removed(small, run, inputs, fake_jobs, tmp_path):
  def job(stage):
    (stage.directory / 'checkpoints' / '2').mkdir(parents=True)
    return {}

  fake_jobs(sft=job)
  run(small('sft', **inputs), tmp_path / 'w')
  assert [p.name for p in (tmp_path / 'w' / 'sft').iterdir()] == ['stage.json']


def test_a_stage_killed_at_its_end_stays_finished(
  small, run, inputs, fake_jobs, tmp_path, monkeypatch
):
  """Its training states are removed once stage.json is written, if need be by the next run."""
  ran, checkpoints = [], tmp_path / 'w' / 'sft' / 'checkpoints'

  def job(stage):
    ran.append(stage.name)
    (checkpoints / '2').mkdir(parents=True)
    return {}

  def kill(stage):
    raise KeyboardInterrupt

  fake_jobs(sft=job)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(pipeline, '_drop_states', kill)
    run(small('sft', **inputs), tmp_path / 'w')
  assert checkpoints.exists()
  run(small('sft', **inputs), tmp_path / 'w')
  assert ran == ['sft'] and not checkpoints.exists()


def test_a_run_may_be_moved(small, run, counted, inputs, tmp_path):
  s = small('sft', 'reward', **inputs)
  run(s, tmp_path / 'w')
  (tmp_path / 'w').rename(tmp_path / 'moved')
  run(s, tmp_path / 'moved')
  assert counted == ['sft', 'reward']


def test_an_edited_function_reruns_the_stages_that_call_it(
  small, run, fake_jobs, inputs, tmp_path, capsys, monkeypatch
):
  ran = []

  def job(stage):
    ran.append(stage.name)
    (stage.directory / 'output').write_text('')
    return {}

  fake_jobs(sft=job, ppo=job, evaluate=job)
  monkeypatch.setitem(JOBS, 'evaluate', dataclasses.replace(JOBS['evaluate'], print_table=None))
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'edited_rules.py').write_text('def f(prompt, response):\n  return 1.0\n')
  (tmp_path / 'edited_gold.py').write_text('def f(prompt, response):\n  return 1.0\n')
  values = {
    'reward_shaping.reward_model_weight': 0.0,
    'reward_shaping.reward_fn': 'edited_rules:f',
    'evaluate.gold_reward_fn': 'edited_gold:f',
  }
  s = small('sft', 'ppo', 'evaluate', **inputs, **values)
  run(s, tmp_path / 'w')
  run(s, tmp_path / 'w')
  assert ran == ['sft', 'ppo', 'evaluate']
  (tmp_path / 'edited_rules.py').write_text('def f(prompt, response):\n  return -1.0\n')
  run(s, tmp_path / 'w')
  assert ran[3:] == ['ppo', 'evaluate']
  assert 'source of reward_shaping.reward_fn changed' in capsys.readouterr().out
  (tmp_path / 'edited_gold.py').write_text('def f(prompt, response):\n  return -1.0\n')
  run(s, tmp_path / 'w')
  assert ran[5:] == ['evaluate']  # PPO does not call it without eval_every
  assert 'source of evaluate.gold_reward_fn changed' in capsys.readouterr().out


def test_other_versions_rerun(small, run, counted, inputs, tmp_path, capsys, monkeypatch):
  s = small('sft', **inputs)
  run(s, tmp_path / 'w')
  now = source_code.versions() | {'jax': '99.0'}
  monkeypatch.setattr(source_code, 'versions', lambda: now)
  run(s, tmp_path / 'w')
  assert counted == ['sft', 'sft']
  assert 'version of jax' in capsys.readouterr().out


def test_a_moved_hub_id_reruns(small, run, counted, inputs, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(remote_inputs, 'identify', lambda path, is_rows: commits[path])
  commits = {'owner/model': 'a', 'owner/rows': 'a'}
  s = small('sft', **{'policy.path': 'owner/model', 'data.path': 'owner/rows'})
  for path in (None, None, 'owner/model', 'owner/rows'):
    commits |= {path: 'b'} if path else {}
    run(s, tmp_path / 'w')
  assert counted == ['sft'] * 3
  out = capsys.readouterr().out
  assert 'content of policy.path changed' in out and 'content of data.path changed' in out


def test_a_run_without_files_writes_nothing(small, run, fake_jobs, tmp_path):
  fake_jobs(selfcheck=lambda stage: {}, chat=lambda stage: {'answers': 1})
  assert run(small('selfcheck', 'chat'), tmp_path / 'w')['chat']['answers'] == 1
  assert not (tmp_path / 'w').exists()


def test_config_json_keeps_the_config_of_every_command(small, run, counted, inputs, tmp_path):
  """In the order in which the stages ran; a stage that is reused keeps its own."""
  s = small('sft', 'reward', **inputs)
  run(s, tmp_path / 'w')
  run(replace(s, stages=('sft',), max_skipped_steps=9), tmp_path / 'w')  # reused
  run(replace(small('reward', **inputs), **{'reward.max_steps': 3}), tmp_path / 'w')
  record = stage_history.read(tmp_path / 'w')
  assert list(record) == ['sft', 'reward']
  assert record['sft'].config['max_skipped_steps'] == s.max_skipped_steps
  assert record['sft'].config['stages'] == ['sft', 'reward']
  assert record['reward'].config['reward']['max_steps'] == 3
  run(replace(s, **{'stages': ('sft',), 'sft.max_steps': 5}), tmp_path / 'w')
  assert list(stage_history.read(tmp_path / 'w')) == ['reward', 'sft']
  run(replace(s, stages=('sft',)), tmp_path / 'w')  # its first results are back in their place
  assert counted == ['sft', 'reward', 'reward', 'sft']
  assert stage_history.read(tmp_path / 'w')['sft'].config['sft']['max_steps'] == 2


def test_the_message_of_a_failed_stage_is_recorded(small, run, inputs, fake_jobs, tmp_path):
  def job(stage):
    raise UserError('data.path=x is empty; name another file.')

  fake_jobs(sft=job)
  with pytest.raises(UserError):
    run(small('sft', **inputs), tmp_path / 'w')
  message = 'data.path=x is empty; name another file.'
  assert stage_history.read(tmp_path / 'w')['sft'].error == message
  assert message in (tmp_path / 'w' / 'report.html').read_text()
  fake_jobs(sft=lambda stage: {'loss': 1.0})
  run(small('sft', **inputs), tmp_path / 'w')
  assert stage_history.read(tmp_path / 'w')['sft'].error == ''
  assert message not in (tmp_path / 'w' / 'report.html').read_text()


def test_out_of_memory_names_what_to_lower(small, run, inputs, fake_jobs, tmp_path):
  def job(stage):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore')

  fake_jobs(sft=job)
  with pytest.raises(
    UserError, match=r'^sft ran out of memory .* 9 bytes.\); lower .*micro_batch_s'
  ):
    run(small('sft', **inputs), tmp_path / 'w')
  config = small('sft', **inputs | {'sft.micro_batch_tokens': 4096})
  with pytest.raises(UserError, match=r'lower .*config.sft.micro_batch_tokens, or see'):
    run(config, tmp_path / 'w')


def test_pieces_hold_the_longest_sequences(small, run, inputs, tmp_path):
  changes = inputs | {'sft.micro_batch_tokens': 64, 'data.max_length': 128}
  message = r'config.sft.micro_batch_tokens=64 has no room .* data.max_length = 128 tokens; use at '
  with pytest.raises(UserError, match=message + 'least 128'):
    run(small('sft', **changes), tmp_path / 'w')
