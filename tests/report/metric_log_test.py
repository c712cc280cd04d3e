"""metrics.jsonl: one step late, valid JSON, each step once; the stop after skipped updates."""

import json
import os
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.report import timing
from segjax.report.console import ProgressBar
from segjax.report.metric_log import MetricLog, Options, TooManySkippedStepsError


def _log(directory, total=4, start=0, **options):
  bar = ProgressBar('sft', total)
  return MetricLog(directory, bar, ['loss'], start=start, options=Options(**options))


def _lines(directory):
  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (directory / 'metrics.jsonl').read_text()
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_steps_are_written_one_late_and_all_at_the_end(tmp_path):
  with _log(tmp_path) as log:
    log.log(0, {'loss': jnp.float32(2)})
    assert _lines(tmp_path) == []
    log.log(1, {'loss': jnp.float32(1)})
    assert [line['step'] for line in _lines(tmp_path)] == [0]
  assert [(line['step'], line['loss']) for line in _lines(tmp_path)] == [(0, 2), (1, 1)]
  assert log.last['loss'] == 1
  assert list((tmp_path / 'tensorboard').iterdir())


def test_restart_keeps_the_steps_before_and_drops_those_after(tmp_path):
  with _log(tmp_path) as log:
    for step in range(4):
      log.log(step, {'loss': jnp.float32(step)})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # stopped in the middle of a line
  with _log(tmp_path, start=2) as log:
    assert log.last['loss'] == 1
    log.log(2, {'loss': jnp.float32(20)})
  assert [(line['step'], line['loss']) for line in _lines(tmp_path)] == [(0, 0), (1, 1), (2, 20)]
  with _log(tmp_path):
    pass
  assert _lines(tmp_path) == []


def test_skipped_update_stops_the_run_and_names_step_and_metric(tmp_path):
  skipped = {
    'loss': jnp.float32(jnp.nan),
    'grad_norm': jnp.float32(jnp.inf),
    'skipped_updates': jnp.int32(1),
  }
  with (
    pytest.raises(TooManySkippedStepsError, match='step 2: grad_norm, loss not finite'),
    _log(tmp_path) as log,
  ):
    log.log(
      0, {'loss': jnp.float32(1), 'grad_norm': jnp.float32(1), 'skipped_updates': jnp.int32(0)}
    )
    log.log(1, skipped)
  last = _lines(tmp_path)[-1]
  assert (last['step'], last['loss'], last['grad_norm']) == (1, 'nan', 'inf')


def test_only_consecutive_skipped_updates_count(tmp_path):
  with (
    pytest.raises(TooManySkippedStepsError, match=r'step 6: .*2 step'),
    _log(tmp_path, max_skipped_steps=2) as log,
  ):
    for step, skipped in enumerate([1, 0, 1, 0, 1, 1]):
      log.log(
        step,
        {'loss': jnp.float32(jnp.nan if skipped else 1), 'skipped_updates': jnp.int32(skipped)},
      )
  assert [line['step'] for line in _lines(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_skipped_updates_are_logged_and_counted_over_a_restart(tmp_path, capsys):
  skipped = {'objective/kl': jnp.float32(300), 'skipped_updates': jnp.int32(4)}
  with _log(tmp_path, max_skipped_steps=3) as log:
    log.log(0, {'objective/kl': jnp.float32(1), 'skipped_updates': jnp.int32(0)})
    log.log(1, skipped)
    log.log(2, skipped)
  assert (
    'sft         warning: step 3: objective/kl 300 beyond bounds, 2 step(s) in a row'
    in capsys.readouterr().out
  )
  stopped = pytest.raises(
    TooManySkippedStepsError, match=r'step 4: objective/kl 300 beyond bounds, 3 step\(s\)'
  )
  with stopped, _log(tmp_path, start=3, max_skipped_steps=3) as log:
    log.log(3, skipped)
    log.flush()


def test_a_kill_during_truncation_loses_no_line(tmp_path, monkeypatch):
  with _log(tmp_path) as log:
    log.log(0, {'loss': jnp.float32(1)})
  before = _lines(tmp_path)

  def kill(*_, **__):
    raise KeyboardInterrupt

  for owner, name in ((os, 'fsync'), (Path, 'replace')):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(owner, name, kill)
      _log(tmp_path, start=1)
    assert _lines(tmp_path) == before


def test_rates_come_from_tokens_flops_and_the_peak(tmp_path):
  with _log(tmp_path, peak_flops=1e9) as log:
    log.log(0, {'perf/tokens': 500.0, 'perf/flops': 1e6, 'reward/by_position/1': np.nan})
  (line,) = _lines(tmp_path)
  assert line['perf/tokens_per_second'] == pytest.approx(500 / line['timing/step'])
  assert line['perf/mfu'] == pytest.approx(1e6 / 1e9 / line['timing/step'])
  assert line['perf/num_compiles'] >= 0
  # Neither the inputs of the rates nor a tenth without segments is logged.
  assert not {'perf/tokens', 'perf/flops', 'reward/by_position/1'} & set(line)


@pytest.fixture(scope='module')
def slow():
  """A program that is dispatched at once and takes a while."""

  @jax.jit
  def function(x):
    return jax.lax.fori_loop(0, 200, lambda _, y: 1e-3 * y @ y, x).sum()

  function(jnp.ones((256, 256))).block_until_ready()
  return lambda: function(jnp.ones((256, 256)))


def test_seconds_of_a_step_are_those_in_which_it_was_computed(tmp_path, slow):
  with _log(tmp_path, total=6) as log:
    begin = time.monotonic()
    for step in range(6):
      log.log(step, {'loss': slow(), 'perf/tokens': 100.0})
    log.flush()
    wall = time.monotonic() - begin
  seconds = [line['timing/step'] for line in _lines(tmp_path)]
  shortest = 0.1 * wall / 6  # a dispatch takes a thousandth of a step; the machine's speed varies
  assert min(seconds) > shortest and sum(seconds) == pytest.approx(wall, rel=0.1)
  assert max(line['perf/tokens_per_second'] for line in _lines(tmp_path)) < 100 / shortest


def test_compiling_is_no_part_of_a_step(tmp_path):
  begin = time.monotonic()
  with _log(tmp_path) as log:
    new = jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x.T), axis=0).sum())
    log.log(0, {'loss': new(jnp.ones((8, 3)))})
    log.log(1, {'loss': new(jnp.ones((8, 3)))})
  wall = time.monotonic() - begin
  first, second = _lines(tmp_path)
  assert first['timing/compile'] > 0 and second['timing/compile'] == 0
  total = sum(line[f'timing/{part}'] for line in (first, second) for part in ('step', 'compile'))
  assert total <= wall
  assert first['perf/num_compiles'] == second['perf/num_compiles']


def test_compiling_while_the_devices_compute_costs_no_time(tmp_path, monkeypatch):
  """Step 1 is dispatched after 4 s of compiling, 3 of which the devices compute step 0."""
  clock = [0.0]
  monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
  monkeypatch.setattr(timing, '_intervals', [(0.0, 1.0), (2.0, 6.0)])
  completions = iter([5.0, 8.0])
  monkeypatch.setattr(timing.Completion, 'wait', lambda _: next(completions))
  with _log(tmp_path) as log:
    clock[0] = 1.5
    log.log(0, {'loss': 1.0})
    clock[0] = 6.5
    log.log(1, {'loss': 1.0, 'timing/evaluate': 1.0, 'perf/tokens': 30.0})
  lines = [(line['timing/step'], line['timing/compile']) for line in _lines(tmp_path)]
  assert lines == [(4.0, 1.0), (2.0, 1.0)]
  assert _lines(tmp_path)[1]['perf/tokens_per_second'] == 30  # without the evaluation


def test_warnings_on_the_console(tmp_path, capsys):
  with _log(tmp_path, total=30, line_every=10.0) as log:
    for step in range(30):
      log.log(step, {'loss': 0.5, 'policy/clipfrac': 0.5 if step > 10 else 0.0})
  out = capsys.readouterr().out.splitlines()
  (warning,) = [line for line in out if 'warning' in line]
  assert 'tokens are clipped' in warning and 'ppo.policy_optimizer.learning_rate' in warning
  assert 'sft         step 30 of 30: loss 0.5' in out


def test_newest_evaluation_is_available_next_to_the_last_step(tmp_path):
  with _log(tmp_path) as log:
    log.log(0, {'loss': 2.0, 'eval/reward': 0.25})
    log.log(1, {'loss': 1.0})
  assert log.evaluated == {'eval/reward': 0.25} and 'eval/reward' not in log.last
  with _log(tmp_path, start=2) as log:
    assert log.evaluated == {'eval/reward': 0.25}
