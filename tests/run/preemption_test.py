"""Signals: the first saves and stops, the second ends the process; one run per directory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from segjax.errors import StepAbortedError
from segjax.run import lock, preemption, training_loop
from segjax.train.optimizer import TrainState

REPOSITORY = Path(__file__).resolve().parents[2]
_TOTAL = 5


def _train(stage, signal_at=None, number=signal.SIGTERM, in_step=False):
  """Runs five steps that add 1; the process gets a signal in step `signal_at`."""

  def step_fn(states, step):
    if step == signal_at:
      os.kill(os.getpid(), number)
      if in_step:
        assert preemption.stop_requested()
        raise StepAbortedError
    state = states['sum']
    params = {'kernel': state.params['kernel'] + 1}
    return {'sum': TrainState(state.step + 1, params, {})}, {'loss': jnp.float32(step)}

  start = {'sum': TrainState(jnp.int32(0), {'kernel': jnp.zeros((1, 1))}, {})}
  states, _ = training_loop.train(stage, start, step_fn, _TOTAL, ['loss'])
  return int(states['sum'].step)


@pytest.fixture
def stage(make_stage, small):
  return make_stage('sft', small('sft'))


def _steps(stage):
  lines = (stage.directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('in_step, saved', [(False, 3), (True, 2)])
def test_a_signal_finishes_the_step_or_skips_it_then_saves(stage, capsys, number, in_step, saved):
  before = signal.getsignal(number)
  with pytest.raises(
    preemption.PreemptedError, match=f'sft stopped by a signal: step {saved} of 5 is saved'
  ):
    _train(stage, 2, number, in_step)
  assert signal.getsignal(number) is before
  assert f'{signal.Signals(number).name}: saving a checkpoint' in capsys.readouterr().out
  assert _train(stage) == _TOTAL
  assert f'resuming from step {saved} of 5' in capsys.readouterr().out
  assert _steps(stage) == [0, 1, 2, 3, 4]


def test_a_signal_in_the_last_step_lets_the_stage_end(stage):
  assert _train(stage, _TOTAL - 1) == _TOTAL


def test_a_signal_before_the_first_step_is_done_saves_nothing(stage):
  with pytest.raises(preemption.PreemptedError, match='nothing is saved'):
    _train(stage, 0, in_step=True)
  assert _train(stage) == _TOTAL


def test_a_second_signal_ends_the_process():
  code = (
    'import os, signal, time\n'
    'from segjax.run import preemption\n'
    'with preemption.handle_signals(print):\n'
    '  for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n'
    '  time.sleep(60)\n'
  )
  process = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, timeout=50)
  assert process.returncode == 128 + signal.SIGTERM


def test_a_second_run_is_refused_and_a_stale_lock_is_not(tmp_path):
  code = (
    'import os, sys, time\nfrom pathlib import Path\nfrom segjax.run import lock\n'
    'with lock.lock_workdir(Path(sys.argv[1])):\n  print(os.getpid(), flush=True)\n  '
    'time.sleep(60)\n'
  )
  holder = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
  )
  assert holder.stdout.readline().strip() == str(holder.pid)
  refused = pytest.raises(ValueError, match=f'in use by process {holder.pid} on ')
  with refused, lock.lock_workdir(tmp_path):
    pass
  assert json.loads((tmp_path / lock.FILE).read_text())['pid'] == holder.pid
  holder.kill()
  holder.wait()
  holder.stdout.close()
  with lock.lock_workdir(tmp_path):
    assert json.loads((tmp_path / lock.FILE).read_text())['pid'] == os.getpid()
