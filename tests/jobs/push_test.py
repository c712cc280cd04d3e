"""--push_to: the last model of a run, after checks before it."""

import pytest
from fixtures import fake_hub, runs

import segjax
from segjax import processes
from segjax.config import parse, presets
from segjax.errors import UserError
from segjax.hf.upload import Repository
from segjax.jobs import pipeline, push


@pytest.fixture
def hub(monkeypatch, tmp_path):
  with fake_hub.serve(monkeypatch, tmp_path) as server:
    yield server


def _stages(workdir, *names):
  config = presets.default_config()
  config.stages = names
  config.update_from_flattened_dict(runs.SIZES)
  return pipeline.prepare(parse.from_config(config), workdir, runs.one_device())


def test_the_last_model_is_uploaded(tmp_path):
  stages = _stages(tmp_path, 'demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate')
  repository = Repository('me/x')
  assert push.find_model_stage(repository, stages).name == 'ppo'
  assert push.find_model_stage(repository, stages[:4]).name == 'reward'
  with pytest.raises(UserError, match='needs a stage that writes a model, one of demo, sft, rew'):
    push.check(repository, stages[-1:])


def test_a_run_uploads_its_model_and_report(hub, tmp_path):
  """A whole run, of the shortest stage that writes a model."""
  run = {'mesh': runs.one_device(), 'push_to': 'me/demo'}
  config = {'stages': ('demo',), **runs.SIZES}
  with pytest.raises(UserError, match='the token belongs to me, lab'):
    segjax.train(config, tmp_path / 'run', mesh=runs.one_device(), push_to='you/demo')
  assert not (tmp_path / 'run').exists()  # told before the run
  hub.failures = 1
  with pytest.raises(UserError, match='is complete, try again: `segjax convert push'):
    segjax.train(config, tmp_path / 'run', **run)
  assert (tmp_path / 'run' / 'demo' / 'stage.json').exists()
  segjax.train(config, tmp_path / 'run', **run)
  files = hub.files['me/demo']
  model = tmp_path / 'run' / 'demo' / 'model'
  assert files['model.safetensors'] == (model / 'model.safetensors').read_bytes()
  assert files['report.html'] == (tmp_path / 'run' / 'report.html').read_bytes()
  assert len(hub.commits['me/demo']) == 1


def test_only_the_first_process_uploads(hub, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_process_index', 1)
  monkeypatch.setattr(processes, '_process_count', 2)
  monkeypatch.setattr(processes, 'broadcast_from_first', lambda value: value)
  stages = _stages(tmp_path, 'demo')
  push.check(Repository('me/x'), stages)
  push.run(Repository('me/x'), stages)
  assert not hub.requests


def test_dry_run_tells_what_would_be_uploaded(hub, tmp_path, capsys):
  stages = _stages(tmp_path, 'demo', 'sft')
  push.describe(Repository('me/x'), stages)
  out = capsys.readouterr().out
  assert f'{tmp_path}/sft/model would be uploaded to {hub.address}/me/x (private' in out
  assert 'parameters, README.md, report.html, results.json' in out
  runs.policy(tmp_path)
  push.describe(Repository('me/x'), stages[:1])
  assert 'model.safetensors' in capsys.readouterr().out
  assert not hub.requests
