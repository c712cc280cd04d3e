"""The training loop: checkpoints, resuming, stop at skipped steps. Step counts, limits, keys."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from jax.sharding import NamedSharding, PartitionSpec

from segjax.config.settings import SFT, replace
from segjax.data.limits import Limits
from segjax.errors import UserError
from segjax.model.llama import make_config
from segjax.report.metric_log import TooManySkippedStepsError
from segjax.run import inputs, training_loop
from segjax.train.optimizer import TrainState


@jax.jit
def _add(state, amount):
  """Adds the amount if it is finite, as the training steps do; else skips the update."""
  is_finite = jnp.isfinite(amount)
  kernel = state.params['kernel'] + jnp.where(is_finite, amount, 0)
  step = state.step + is_finite.astype(jnp.int32)
  metrics = {'loss': amount, 'skipped_updates': 1 - is_finite.astype(jnp.int32)}
  return TrainState(step, {'kernel': kernel}, state.opt_state), metrics


def _train(stage, amounts, stop_at=None):
  """Adds up the amounts, one per step; raises KeyboardInterrupt before step `stop_at`."""

  def step_fn(states, step):
    if step == stop_at:
      raise KeyboardInterrupt
    state, metrics = _add(states['sum'], jnp.float32(amounts[step]))
    return {'sum': state}, metrics

  start = {'sum': TrainState(jnp.int32(0), {'kernel': jnp.zeros((1, 1))}, {})}
  states, last = training_loop.train(stage, start, step_fn, len(amounts), ['loss'])
  return float(states['sum'].params['kernel'][0, 0]), last


def _steps(stage):
  lines = (stage.directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def _saved_steps(stage):
  return sorted(int(p.name) for p in (stage.directory / 'checkpoints').iterdir())


@pytest.fixture
def stage(make_stage, small):
  return make_stage('sft', small('sft', **{'checkpoint.every_steps': 2}))


def test_a_run_whose_steps_were_all_skipped_is_an_error(make_stage, small):
  stage = make_stage('sft', small('sft', max_skipped_steps=9))
  with pytest.raises(UserError, match='sft made no update: all steps were skipped'):
    _train(stage, [math.nan, math.inf])
  assert _steps(stage) == [0, 1]


def test_weights_that_stay_the_same_are_told(stage, capsys):
  _train(stage, [0.0, 0.0])
  assert 'warning: training has not changed a single weight of the sum' in capsys.readouterr().out
  _train(stage, [0.0, 1.0])
  assert 'warning' not in capsys.readouterr().out


def test_all_steps_run_and_are_logged(stage):
  total, last = _train(stage, [1, 2, 4, 8, 16])
  assert total == 31
  assert last['loss'] == 16
  assert _steps(stage) == [0, 1, 2, 3, 4]
  assert _saved_steps(stage) == [2, 4]


def test_interrupted_stage_resumes_from_its_newest_checkpoint(stage, capsys):
  with pytest.raises(KeyboardInterrupt):
    _train(stage, [1, 2, 4, 8, 16], stop_at=3)
  total, _ = _train(stage, [100, 100, 4, 8, 16])  # the first two are not run again
  assert total == 31
  assert _steps(stage) == [0, 1, 2, 3, 4]
  assert 'resuming from step 2 of 5' in capsys.readouterr().out


def test_without_checkpoints_an_interrupted_stage_begins_again(make_stage, small):
  stage = make_stage('sft', small('sft'))
  with pytest.raises(KeyboardInterrupt):
    _train(stage, [1, 2, 4], stop_at=2)
  assert _train(stage, [1, 2, 4])[0] == 7
  assert _steps(stage) == [0, 1, 2]


@pytest.mark.parametrize('skipped', [0, 2, 4])
def test_skipped_step_stops_the_run_with_the_state_saved(stage, skipped):
  amounts = [1, 2, 4, 8, 16]
  amounts[skipped] = np.nan
  with pytest.raises(TooManySkippedStepsError) as error:
    _train(stage, amounts)
  assert f'sft, step {skipped + 1}: loss not finite' in str(error.value)
  assert '\n' not in str(error.value)
  assert f'checkpoints/{_saved_steps(stage)[-1]}' in str(error.value)
  # The state has every finite step; resuming skips the other and repeats none.
  total, last = _train(stage, amounts)
  assert total == 31 - 2**skipped
  assert np.isnan(last['loss']) == (skipped == 4)
  assert _steps(stage) == [0, 1, 2, 3, 4]


def test_more_skipped_steps_may_be_allowed(make_stage, small):
  stage = make_stage('sft', small('sft', max_skipped_steps=3))
  assert _train(stage, [1, np.nan, np.inf, 8, np.nan])[0] == 9


@pytest.mark.parametrize(
  'steps, epochs, rows, batch, expected',
  [(5, 1, 100, 10, 5), (0, 1, 100, 10, 10), (0, 3, 25, 10, 6), (7, 9, 10, 10, 7)],
)
def test_num_steps(steps, epochs, rows, batch, expected):
  settings = SFT(max_steps=steps, num_epochs=epochs, batch_size=batch)
  assert training_loop.count_steps(settings, rows, 'sft') == expected


def test_batch_larger_than_the_data():
  with pytest.raises(
    ValueError, match=r'config.sft.batch_size=64 is more than the 10 rows .* at most 10'
  ):
    training_loop.count_steps(SFT(batch_size=64), 10, 'sft')


def test_limits_never_exceed_the_positions(small, capsys):
  settings = small('sft')
  config = make_config(settings.network)
  assert inputs.length_limits(settings.data, config, print) == Limits(96, 32, 'truncate_left')
  short = make_config(replace(settings, **{'network.max_position_embeddings': 48}).network)
  assert inputs.length_limits(settings.data, short, print) == Limits(48, 16, 'truncate_left')
  assert '48 tokens' in capsys.readouterr().out


def test_keys_differ_by_purpose_stage_and_seed(make_stage, small):
  keys = [
    make_stage('sft', small('sft')).key('head'),
    make_stage('sft', small('sft')).key('samples'),
    make_stage('ppo', small('sft')).key('head'),
    make_stage('sft', small('sft', seed=1)).key('head'),
  ]
  assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4


def test_a_key_is_the_same_on_every_mesh_of_a_process(make_stage, small):
  """As of two runs of a notebook, one on all devices and one on the first alone."""
  stage = make_stage('sft', small('sft'))
  numbers = []
  for devices in (8, 1):
    mesh = models.mesh(devices)
    with jax.set_mesh(mesh):
      key = dataclasses.replace(stage, mesh=mesh).key('samples')
      placed = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec()))
      numbers.append(np.asarray(_noise(key, placed)))
  np.testing.assert_array_equal(*numbers)


@jax.jit
def _noise(key, x):
  return x + jax.random.uniform(key, x.shape)
