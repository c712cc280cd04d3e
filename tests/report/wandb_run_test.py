"""Weights & Biases, by a small stand-in: a missing key, a server that refuses, a resumed run."""

import sys
import types

import pytest

from segjax.errors import UserError
from segjax.report import wandb_run
from segjax.report.console import ProgressBar
from segjax.report.metric_log import MetricLog, Options


class FakeWandb(types.ModuleType):
  """The package wandb with runs by id; like W&B, a run ignores steps before its newest one."""

  class Error(Exception):
    pass

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = types.SimpleNamespace()
    self.key, self.is_down = 'key', False
    self.runs, self.names, self.exit_codes, self.dropped = {}, [], [], 0

  def login(self):
    if not self.key:
      raise self.Error('No API key configured. Use `wandb login` to log in.')
    return True

  def init(self, project, name, id, resume, dir):
    if self.is_down:
      raise self.Error('Run initialization has timed out after 90.0 sec.\nPlease try again.')
    assert (resume == 'allow') == (id in self.runs)
    history = self.runs.setdefault(id, {})
    self.names.append((project, name))
    run = types.SimpleNamespace(step=max(history, default=-1) + 1)

    def log(values, step):
      self.dropped += step < run.step
      run.step = step
      history[step] = values['loss']

    run.log, run.finish = log, lambda exit_code: self.exit_codes.append(exit_code)
    return run


@pytest.fixture
def wandb(monkeypatch):
  module = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  return module


def _train(directory, steps, stop=None):
  bar = ProgressBar('sft', 4)
  with MetricLog(directory, bar, [], start=steps[0], options=Options(wandb_project='p')) as log:
    for step in steps:
      log.log(step, {'loss': float(step)})
    log.flush()
    if stop:
      raise stop


def test_a_missing_key_is_refused_in_one_line(wandb, monkeypatch):
  wandb_run.check_login('p')
  wandb.key = ''
  with pytest.raises(UserError) as error:
    wandb_run.check_login('p')
  assert str(error.value) == (
    "config.wandb_project='p': No API key configured. Use `wandb login` to log in; run `wandb "
    'login`, or set WANDB_API_KEY, or keep the metrics on this disk by WANDB_MODE=offline.'
  )
  wandb_run.check_login('')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  wandb_run.check_login('p')


def test_a_resumed_stage_continues_its_run(wandb, tmp_path):
  directory = tmp_path / 'demo' / 'sft'
  with pytest.raises(KeyboardInterrupt):
    _train(directory, range(3), KeyboardInterrupt())
  _train(directory, range(1, 4))  # from a checkpoint after step 0
  (history,) = wandb.runs.values()
  assert history == {0: 0, 1: 1, 2: 2, 3: 3} and wandb.dropped == 0
  assert wandb.names == [('p', 'demo/sft')] * 2 and wandb.exit_codes == [1, 0]
  _train(tmp_path / 'demo' / 'reward', range(2))
  assert len(wandb.runs) == 2


def test_a_server_that_does_not_answer_is_one_line(wandb, tmp_path):
  wandb.is_down = True
  with pytest.raises(UserError, match=r"^config.wandb_project='p': Run .* sec; .*offline\.$"):
    _train(tmp_path, range(1))
