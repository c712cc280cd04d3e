"""What tests of jobs share: one device, a small language with an untrained network."""

import dataclasses

import jax
import pytest
from fixtures import runs

from segjax.config import presets, validate
from segjax.jobs import pipeline
from segjax.model.sharding import make_mesh
from segjax.run.stage import Stage


@pytest.fixture(scope='session')
def one_device():
  """A mesh of one of the eight devices."""
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='session')
def small():
  """Settings of a run so small that compiling is all it costs: `small('sft', **{key: value})`."""

  def make(*stages, **values):
    config = presets.default_config()
    config.stages = stages
    config.update_from_flattened_dict(
      {
        'runtime.remat': 'none',
        **runs.SIZES,
        'data.max_length': 96,
        'data.max_prompt_length': 32,
        'sft.batch': 8,
        'sft.steps': 2,
        'sft.optimizer.learning_rate': 1e-2,
        'reward.batch': 8,
        'reward.steps': 2,
        'reward.holdout': 0.25,
        'normalizer.batch': 8,
        'ppo.steps': 2,
        'ppo.rollout_batch': 8,
        'ppo.minibatch': 4,
        'rollout.max_new_tokens': 8,
        'evaluate.batch': 8,
      }
      | values
    )
    return validate.from_config(config)

  return make


@pytest.fixture(scope='session')
def language(tmp_path_factory, one_device, small):
  """A directory with `model/` (untrained, with tokenizer) and `rows/` of the built-in language."""
  workdir = tmp_path_factory.mktemp('language')
  (stage,) = pipeline.prepare(small('demo'), workdir, one_device)
  pipeline.run([stage], workdir, 0.0)
  return workdir / 'demo'


@pytest.fixture
def stage_of(tmp_path, one_device):
  """A stage of some settings in a directory of the test's own."""

  def make(name, values, mesh=None):
    return Stage(name, values, tmp_path / name, mesh or one_device)

  return make


@pytest.fixture
def run(tmp_path, one_device):
  """Prepares and runs all stages of some settings in the test's directory; returns the results."""

  def go(values, workdir=None):
    place = workdir or tmp_path
    stages = pipeline.prepare(values, place, one_device)
    pipeline.check_complete(stages)
    return pipeline.run(stages, place, 0.0)

  return go


@pytest.fixture
def fake_jobs(monkeypatch):
  """Puts other `run` functions in the place of jobs': fake_jobs(sft=function)."""

  def put(**functions):
    for name, function in functions.items():
      job = dataclasses.replace(pipeline.JOBS[name], run=function, figures=())
      monkeypatch.setitem(pipeline.JOBS, name, job)

  return put
