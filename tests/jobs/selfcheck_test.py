"""The self-check passes, and fails if an invariant is violated."""

import functools
import math

import jax
import pytest

from segjax.config import parse, presets
from segjax.jobs import pipeline, selfcheck, selfcheck_packing, selfcheck_rewards
from segjax.jobs.selfcheck import CheckResult
from segjax.model.mesh import make_mesh


@pytest.fixture(scope='module')
def values():
  config = presets.default_config()
  config.stages = ('selfcheck',)
  return parse.from_config(config)


@pytest.mark.campaign
def test_all_checks_pass_on_two_devices(values, tmp_path):
  mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
  (stage,) = pipeline.prepare(values, tmp_path, mesh)
  outcomes = pipeline.run([stage], tmp_path, 0.0)['selfcheck']
  assert len(outcomes) >= 12
  assert all(
    CheckResult(**outcome).status == 'ok' for name, outcome in outcomes.items() if name != 'seconds'
  )


def test_one_device_has_nothing_to_compare():
  assert CheckResult(math.nan, math.nan).status == 'skipped'
  assert CheckResult(1e-3, 1e-4).status == 'FAILED'
  assert CheckResult(math.nan, 1e-4).status == 'FAILED'


def test_a_violated_invariant_is_named(values, make_stage, monkeypatch):
  monkeypatch.setattr(
    selfcheck, 'checks', lambda *_: [('numbers agree', lambda: CheckResult(1.0, 1e-4))]
  )
  monkeypatch.setattr(selfcheck, 'make_fixture', lambda mesh: None)
  with pytest.raises(ValueError, match='1 of 1 checks failed: numbers agree'):
    selfcheck.run(make_stage('selfcheck', values))


@pytest.mark.campaign
def test_oracle_detects_a_wrong_reward(monkeypatch):
  real = selfcheck_rewards.make_experience

  def wrong(*args, **kwargs):
    import dataclasses

    experience, metrics = real(*args, **kwargs)
    return dataclasses.replace(experience, reward=experience.reward + 0.01), metrics

  monkeypatch.setattr(selfcheck_rewards, 'make_experience', wrong)
  assert selfcheck_rewards.max_abs_error_vs_oracle('segment') > 5e-3


@pytest.mark.campaign
def test_rows_that_are_scored_elsewhere_are_detected(monkeypatch):
  """The check of packed rows reads what `score` returned for them."""
  mesh = make_mesh(devices=jax.devices()[:1])
  fixture, real = selfcheck.make_fixture(mesh), selfcheck_packing.score

  def shifted(*args, **kwargs):
    outputs = real(*args, **kwargs)
    return outputs._replace(old_logprob=outputs.old_logprob + 0.2)

  deviation = functools.partial(
    selfcheck_packing.first_ratio_deviation, mesh, fixture.experience, fixture.recipe
  )
  assert deviation() < 1e-6
  monkeypatch.setattr(selfcheck_packing, 'score', shifted)
  assert deviation() > 0.1
