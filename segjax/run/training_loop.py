"""The loop over steps that all training jobs share: metrics, checkpoints, resuming, stopping."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from segjax import processes
from segjax.config.no_effect import check_learning_rate
from segjax.config.settings import PPO, SFT, CheckpointSettings, PairTraining, Settings
from segjax.config.validate import longest_sequence
from segjax.data.packing_plan import (
  PieceBound,
  packing_efficiency,
  plan_level_packing,
  plan_packing,
)
from segjax.errors import StepAbortedError, UserError
from segjax.model import chips
from segjax.model.agreement import StepAgreement
from segjax.model.attention import skips_other_segments
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import batch_devices
from segjax.report.console import ProgressBar
from segjax.report.metric_log import MetricLog, Options, TooManySkippedStepsError
from segjax.report.profiling import Profiler
from segjax.run import preemption, stage_record
from segjax.run.stage import Stage
from segjax.run.trained import check_trained
from segjax.train.checkpoint import Checkpointer, TrainStates
from segjax.train.checksums import checksums, weight_hashes
from segjax.train.throughput import EFFICIENCY
from segjax.types import PackingPlan

StepFn = Callable[[TrainStates, int], tuple[TrainStates, dict[str, Any]]]

CHECKPOINTS = 'checkpoints'  # a stage's folder of training states


class LastStepReached(Exception):
  """`stage.last_step` steps are done, which are fewer than those of the run."""


def train(
  stage: Stage, states: TrainStates, step_fn: StepFn, num_steps: int, show: Sequence[str]
) -> tuple[TrainStates, dict[str, float]]:
  """Runs `step_fn` until `num_steps` steps are done, resuming from the newest checkpoint.

  Args:
    states: the states before the first step.
    step_fn: (states, step from 0) -> (states, metrics).
    show: the metrics to print on the console.

  Returns:
    The last states and the last step's metrics.

  Raises:
    TooManySkippedStepsError: config.max_skipped_steps in a row; the last good state is saved.
    PreemptedError: the run has received a signal; the states are saved.
    LastStepReached: see `Stage.last_step`.
    UserError: every step was skipped.
  """
  settings, directory = stage.settings, checkpoint_dir(stage)
  checkpointer = _make_checkpointer(stage, directory)
  start, states = checkpointer.restore(states)
  before = checksums(states) if start < num_steps else {}
  if start:
    stage.log(f'resuming from step {start} of {num_steps}, saved in {directory}')
  metric_log = _make_metric_log(stage, start, num_steps, show)
  profiler = Profiler(stage.directory, settings.profile_steps if processes.is_first() else '')
  done, decide = start, StepDecisions(settings.checkpoint, stage.mesh)
  try:
    with preemption.handle_signals(stage.log), metric_log:
      for step in range(start, min(num_steps, stage.last_step or num_steps)):
        profiler.before(step + 1)
        try:
          states, metrics = step_fn(states, step)
          done = step + 1
          profiler.after(done, states)
          metric_log.log(step, metrics | weight_hashes(states))
          stage.refresh()
          must_stop, must_save = decide(done)
        except StepAbortedError:  # in all processes
          must_stop, must_save = True, False
        if start < done < num_steps and (must_stop or must_save):  # at the end the model is saved
          metric_log.flush()  # a resumed run has the metrics of every step before its checkpoint
          if stage.mirror.try_push():  # a state on the bucket is never ahead of its metrics
            checkpointer.save(done, states, metric_log.evaluated | metric_log.last)
        if must_stop and done < num_steps:
          checkpointer.settle()  # the process ends: waits for the write
          raise _preempted(stage.name, checkpointer.latest(), done, num_steps)
  except TooManySkippedStepsError as error:
    # The jitted step kept the state from before each skipped update, so this state is good.
    stage.mirror.try_push()
    checkpointer.save(done, states)
    raise TooManySkippedStepsError(
      f'{stage.name}, {error} The last good state is saved in {directory}/{done}.'
    ) from None
  finally:
    profiler.close()
    checkpointer.close()
  _check_end(stage, before, states, is_last=done == num_steps)
  return states, metric_log.last


def _check_end(stage: Stage, before: dict[str, int], states: TrainStates, *, is_last: bool) -> None:
  if not is_last:
    raise LastStepReached
  check_trained(stage, before, states)


def checkpoint_dir(stage: Stage) -> epath.Path:
  """Returns the directory of the stage's training states.

  config.checkpoint.directory comes first, then the bucket of the working directory, then the
  stage's own directory.
  """
  directory = stage.settings.checkpoint.directory
  if directory:
    return epath.Path(directory) / stage.name
  return stage.mirror.checkpoint_dir(stage.directory) or epath.Path(stage.directory) / CHECKPOINTS


class StepDecisions:
  """Decides after each step, in all processes alike, whether to stop and whether to save.

  Checkpoints are saved by steps, or by time since the last one. What several processes have to
  agree on, signals and the time, comes a step late.
  """

  def __init__(self, settings: CheckpointSettings, mesh: Mesh):
    # Monotonic, because the time of day may be set during the run.
    self._settings, self._last = settings, time.monotonic()
    self._agree = StepAgreement(mesh)

  def __call__(self, done: int) -> tuple[bool, bool]:
    """Returns (whether to stop, whether to save) after `done` steps; every process has to ask."""
    every_steps, seconds = self._settings.every_steps, self._settings.every_minutes * 60
    by_steps = every_steps > 0 and done % every_steps == 0
    # Clocks differ: that of the first process counts.
    is_late = processes.is_first() and 0 < seconds <= time.monotonic() - self._last
    # A save by steps counts too: the limit is on the work that a crash can lose.
    if by_steps or is_late:
      self._last = time.monotonic()
    must_stop, by_time = self._agree(preemption.stop_requested(), is_late)
    return must_stop, by_steps or by_time


def count_steps(settings: SFT | PairTraining, num_rows: int, section: str) -> int:
  """Returns max_steps if positive, otherwise the number of full batches in all epochs.

  Raises:
    UserError: there are fewer rows than a batch holds, or the learning rate is always 0; names the
      key.
  """
  if num_rows < settings.batch_size:
    raise UserError(
      f'config.{section}.batch_size={settings.batch_size} is more than the {num_rows} rows '
      f'available; use at most {num_rows}.'
    )
  num_steps = settings.max_steps or settings.num_epochs * (num_rows // settings.batch_size)
  check_learning_rate(settings.optimizer, num_steps, f'{section}.optimizer')
  return num_steps


def count_known_steps(settings: SFT | PairTraining, num_rows: int, section: str) -> int:
  """Returns `count_steps` for a dry run; without local rows max_steps, 0 if they decide."""
  return count_steps(settings, num_rows, section) if num_rows else settings.max_steps


def plan_packing_for(
  settings: SFT | PairTraining | PPO,
  lengths: np.ndarray,
  mesh: Mesh,
  network: LlamaConfig,
  group: int = 1,
) -> tuple[PackingPlan | None, dict[str, float]]:
  """Returns (how sequences of these lengths are packed, the packing efficiency as a metric).

  (None, {}) if packing_length is 0.

  Args:
    lengths: tokens of each sequence, [N].
    mesh: the devices.
    network: that is trained.
    group: number of consecutive sequences that stay in one piece: 2 for pairs.
  """
  if not settings.packing_length:
    return None, {}
  if settings.micro_batch_tokens:
    packing = plan_level_packing(lengths, piece_bound(settings, mesh, network), group)
  else:
    packing = plan_packing(lengths, settings.micro_batch_size, settings.packing_length, group)
  return packing, packing_metrics(packing)


def packing_metrics(packing: PackingPlan | None) -> dict[str, float]:
  """Returns the packing efficiency as a metric; {} for None."""
  return {} if packing is None else {EFFICIENCY: packing_efficiency(packing)}


def piece_bound(settings: SFT | PairTraining | PPO, mesh: Mesh, network: LlamaConfig) -> PieceBound:
  """Returns the bound of a packed piece by micro_batch_tokens."""
  width = settings.packing_length
  widens = skips_other_segments(network.attention, width, network.head_dim)
  return dataclasses.replace(_room(settings, mesh), widens=widens)


def check_micro_batch(s: Settings, section: str, mesh: Mesh) -> None:
  """Raises UserError if micro_batch_tokens has no room for the longest sequences on this mesh."""
  settings = getattr(s, section, None)
  if not getattr(settings, 'micro_batch_tokens', 0):
    return
  bound, (longest, what) = _room(settings, mesh), longest_sequence(s, section)
  group = 2 if isinstance(settings, PairTraining) else 1
  needed = bound.needed(longest, group) if settings.packing_length else group * longest
  if bound.tokens < needed:
    raise UserError(
      f'config.{section}.micro_batch_tokens={settings.micro_batch_tokens} has no room for rows of '
      f'{what} = {longest} tokens; use at least {-(-needed * bound.devices // mesh.size)}.'
    )


def _room(settings: SFT | PairTraining | PPO, mesh: Mesh) -> PieceBound:
  devices = batch_devices(mesh)
  tokens = settings.micro_batch_tokens * mesh.size // devices
  return PieceBound(devices, tokens, settings.packing_length)


def prefix_metrics(prefix: str, metrics: dict[str, Any]) -> dict[str, Any]:
  """Returns the metrics of a step as `prefix/name`; `skipped_updates` has one name in all jobs."""
  return {k if k == 'skipped_updates' else f'{prefix}/{k}': value for k, value in metrics.items()}


def _make_checkpointer(stage: Stage, directory: epath.Path) -> Checkpointer:
  settings = stage.settings.checkpoint
  return Checkpointer(
    directory,
    settings.max_to_keep,
    best=settings.best_metric,
    max_failures=settings.max_failures,
    run=stage_record.stored_key(stage.directory),
    differences=stage_record.changed_keys,
    log_fn=stage.log,
  )


def _make_metric_log(stage: Stage, start: int, num_steps: int, show: Sequence[str]) -> MetricLog:
  settings = stage.settings
  options = Options(
    settings.max_skipped_steps,
    settings.wandb_project,
    settings.log_every,
    _peak_flops(stage.mesh),
    stage.seconds_after,
  )
  # With lines of metrics a log file needs no others.
  bar = ProgressBar(stage.name, num_steps, start, in_log_file=not settings.log_every)
  return MetricLog(stage.directory, bar, show, start=start, options=options)


def _peak_flops(mesh: Mesh) -> float:
  """Returns the bfloat16 FLOP/s of all devices together; 0 for a device of unknown speed."""
  chip = chips.chip_for_kind(mesh.devices.flat[0].device_kind)
  return chip.flops * mesh.size if chip else 0.0


def _preempted(
  name: str, saved: int | None, done: int, num_steps: int
) -> preemption.PreemptedError:
  state = f'step {saved} of {num_steps} is saved' if saved else 'nothing is saved'
  lost = '' if saved == done else f' ({done} were done)'
  return preemption.PreemptedError(
    f'{name} stopped by a signal: {state}{lost}; repeat the command to resume'
  )
