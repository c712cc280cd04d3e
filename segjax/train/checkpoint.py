"""Training states on disk, through Orbax: saved by step, restored onto the mesh of the run.

A step is a directory, written completely or not at all, of separate items: parameters of each
model, its optimizer, other state, and `manifest` with the checksum of each item and the run that
wrote them. Checkpoints serve to resume; finished models are HF directories (`hf.writer`).
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from segjax import processes, storage
from segjax.errors import UserError, first_line, system_cause
from segjax.train import orbax_log
from segjax.train.checksums import item_checksums
from segjax.train.optimizer import TrainState

TrainStates = dict[str, Any]  # a TrainState per model and other state of the run, by name

_MANIFEST = 'manifest'
_CLEANUP_TRIES, _CLEANUP_PAUSE = 20, 0.1  # seconds
_DAMAGED = 'damaged-'  # prefix of the directory of a step that could not be read


class CheckpointMismatchError(UserError):
  """The checkpoint was written by another run than the one that resumes."""


class Checkpointer:
  """Keeps the last `keep` steps, and the best one, of named states in a directory or bucket.

  Saving copies the states off the devices and writes asynchronously. A failed save, for example on
  a full disk, is logged and retried at the next one; earlier checkpoints stay.

  Args:
    directory: local directory or bucket.
    keep: number of latest steps to keep.
    best: metric whose largest value marks a step that is also kept; '' for none.
    max_failures: number of consecutive saves that may fail.
    run: JSON description of the run; a checkpoint with another description is refused.
    differences: returns the keys in which two such descriptions differ.
    log_fn: is called with a warning for each failure that the run survives.
  """

  def __init__(
    self,
    directory: Any,
    keep: int,
    *,
    best: str = '',
    max_failures: int = 0,
    run: dict[str, Any] | None = None,
    differences: Callable[[dict, dict], list[str]] | None = None,
    log_fn: Callable[[str], None] = print,
  ):
    self._directory = epath.Path(directory)
    if '://' not in str(directory):
      self._directory = epath.Path(self._directory.absolute())  # Orbax refuses a relative path
    self._keep, self._best, self._max_failures = keep, best, max_failures
    self._run, self._differences, self._log = run or {}, differences, log_fn
    # Failures in a row; step of the last save; whether it may still fail.
    self._failures, self._saving, self._is_pending = 0, 0, False
    self._open()

  def _open(self) -> None:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

    policies = [keeping.LatestN(self._keep)]
    if self._best:
      # Steps without the metric, for example before the first evaluation, are never the best.
      lowest = -float('inf')
      policies.append(keeping.BestN(get_metric_fn=lambda m: m.get(self._best, lowest), n=1))
    orbax_log.mute()
    self._ocp = ocp
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keeping.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,  # left by a process that was killed while it saved
    )
    with storage.writing(self._directory):
      self._manager = ocp.CheckpointManager(self._directory, options=options)

  def latest(self) -> int | None:
    """Returns the newest step saved, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, states: TrainStates, metrics: dict[str, float] | None = None) -> None:
    """Saves the states after `step` steps; returns once they are copied off the devices.

    Args:
      step: number of steps done.
      states: states by name.
      metrics: metrics of the step, from which `best` is read.

    Raises:
      UserError: more than `max_failures` consecutive saves have failed.
    """
    self.settle()  # a failure of the pending save counts before the next one starts
    if step in self._manager.all_steps():
      return  # Orbax refuses to save a step again
    items = _items(states)
    # Summed on the devices: a host of a large run holds only a part of the arrays.
    # A collective program: every process has to save, not only the first.
    sums = processes.to_host(jax.jit(item_checksums)(items))
    manifest = {
      'step': step,
      'items': {name: int(value) for name, value in sums.items()},
      'run': self._run,
    }
    saves: dict[str, Any] = {name: self._ocp.args.StandardSave(x) for name, x in items.items()}
    saves[_MANIFEST] = self._ocp.args.JsonSave(manifest)
    self._saving = step
    # Orbax stores metrics as JSON and ranks steps by them; neither can have NaN.
    finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
    try:
      self._manager.save(step, args=self._ocp.args.Composite(**saves), metrics=finite)
      self._is_pending = True
    except Exception as error:
      # Errors of the asynchronous part come in `settle`.
      self._handle_failure(error)

  def settle(self) -> None:
    """Waits for the pending save, and handles its failure."""
    is_pending, self._is_pending = self._is_pending, False
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      self._handle_failure(error)
    else:
      if is_pending:  # not after a save that failed at once
        self._failures = 0  # only failures in a row count

  def _handle_failure(self, error: Exception) -> None:
    """Logs a failed save; raises UserError after too many."""
    self._failures += 1
    # Orbax lists a step as soon as its save has begun.
    before = [step for step in self._manager.all_steps() if step != self._saving]
    last = f'step {max(before)} is the last one saved' if before else 'nothing is saved yet'
    message = (
      f'the checkpoint of step {self._saving} could not be written to {self._directory} '
      f'({system_cause(error)}); {last}'
    )
    if self._failures > self._max_failures:
      raise UserError(f'{message}; make room there and run the same command again.') from error
    self._log(f'warning: {message}; trying again at the next save')
    self._remove_unfinished()
    self._open()  # the old manager waits for the failed write

  def _remove_unfinished(self) -> None:
    """Removes what the failed save left."""
    if not processes.is_first():
      return  # the directory is shared
    # One item failed, but the threads of the others may still write: Orbax's own clean-up would
    # stop at a directory that fills again, and the next save would fail with it.
    for _ in range(_CLEANUP_TRIES):
      unfinished = list(self._directory.glob('*.orbax-checkpoint-tmp'))
      if not unfinished:
        return
      with contextlib.suppress(OSError):  # a thread may add a file meanwhile
        for path in unfinished:
          path.rmtree()
      time.sleep(_CLEANUP_PAUSE)

  def restore(self, like: TrainStates) -> tuple[int, TrainStates]:
    """Returns (newest readable step, its states with the shapes and shardings of `like`).

    Steps that cannot be read are renamed to `damaged-<step>`, with a warning. Returns (0, like)
    where no step is left.

    Raises:
      CheckpointMismatchError: a step was written by another run.
    """
    # Orbax lists a step even if its files are missing or truncated: each is tried, newest first.
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return step, self._read(step, like)
      except (CheckpointMismatchError, MemoryError):
        raise  # the checkpoint is not damaged
      except Exception as error:
        if 'RESOURCE_EXHAUSTED' in str(error):
          raise  # out of device memory: the checkpoint is not damaged
        self._set_aside(step, error)
    return 0, like

  def _read(self, step: int, like: TrainStates) -> TrainStates:
    """Returns the states of a step; raises an error if an item is missing or damaged."""
    names = (*_items(like), _MANIFEST)
    # The manifest first: a checkpoint of another run is refused before its arrays are read.
    manifest = self._manager.restore(
      step, args=self._ocp.args.Composite(**{_MANIFEST: self._ocp.args.JsonRestore()})
    )[_MANIFEST]
    self._check_run(step, manifest)
    # Shardings of `like`, not of the files: a run may resume on other devices.
    targets = {
      name: self._ocp.args.StandardRestore(jax.tree.map(_abstract, item))
      for name, item in _items(like).items()
    }
    restored = self._manager.restore(step, args=self._ocp.args.Composite(**targets))
    items = {name: restored[name] for name in names if name != _MANIFEST}
    # Orbax may read changed bytes, or an item of another step, without an error.
    sums = processes.to_host(jax.jit(item_checksums)(items))
    damaged = [name for name, value in sums.items() if int(value) != manifest['items'][name]]
    if damaged:
      raise OSError(f'{", ".join(damaged)}: wrong checksum')
    return _states(items, like)

  def _check_run(self, step: int, manifest: dict[str, Any]) -> None:
    if not self._run or self._differences is None:
      return
    names = self._differences(manifest['run'], self._run)
    if names:
      raise CheckpointMismatchError(
        f'the checkpoint {self._directory / str(step)} was written by another run: '
        f'{", ".join(names)} differ; give another --workdir or config.checkpoint.directory, or '
        'move the checkpoint away.'
      )

  def _set_aside(self, step: int, error: Exception) -> None:
    """Renames a damaged step, so that it is neither restored nor counted as one of `keep`."""
    aside = self._directory / f'{_DAMAGED}{step}'
    if processes.is_first():  # the directory is shared
      # The same step may have been damaged, set aside and saved again before.
      if aside.exists():
        aside.rmtree()
      (self._directory / str(step)).rename(aside)
    processes.barrier('set aside')
    self._manager.reload()  # the manager caches the list of steps
    self._log(
      f'warning: the checkpoint of step {step} is damaged ({first_line(error)}); it is '
      f'renamed to {aside}'
    )

  def close(self) -> None:
    """Waits for the pending save and closes the manager."""
    self.settle()
    self._manager.close()


def _items(states: TrainStates) -> dict[str, Any]:
  """Returns the states as items that can be restored alone: parameters apart from optimizers."""
  items = {}
  for name, state in states.items():
    if isinstance(state, TrainState):
      # An item of its own: Orbax refuses to restore a part of one, as weights without moments.
      items[name] = state.params
      items[f'{name}_optimizer'] = {'step': state.step, 'opt_state': state.opt_state}
    else:
      items[name] = state
  return items


def _states(items: dict[str, Any], like: TrainStates) -> TrainStates:
  """Returns the states of `items`, the inverse of `_items`; `like` has their types."""
  states = {}
  for name, state in like.items():
    states[name] = items[name]
    if isinstance(state, TrainState):
      rest = items[f'{name}_optimizer']
      states[name] = dataclasses.replace(state, params=items[name], **rest)
  return states


def _abstract(x: jax.Array) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
