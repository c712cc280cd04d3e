"""Computes a step of a stage again and compares it: `segjax replay RUN STEP [--stage=ppo]`.

The stage runs in a directory of its own with the settings that RUN has stored, from its latest
training state before the step, or else from the beginning. Speed and time are not compared.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from segjax.config import parse
from segjax.config.settings import replace
from segjax.errors import UserError, one_line
from segjax.jobs import pipeline, stage_key
from segjax.jobs.registry import JOBS
from segjax.model.mesh import make_mesh
from segjax.report import stage_history
from segjax.report.console import log, table
from segjax.report.metric_log import HASHES, METRICS_FILE
from segjax.run import stage_record
from segjax.run.stage import Stage
from segjax.run.template_date import with_template_date
from segjax.run.training_loop import CHECKPOINTS, LastStepReached, checkpoint_dir
from segjax.storage import read_json_lines

_NOT_COMPARED = ('step', 'timing/', 'perf/')
_MAX_SHOWN = 12  # metrics that differ


class Comparison(NamedTuple):
  """A step of a run, and the same step computed again.

  Attributes:
    changed: settings, inputs and versions that are not those of the run, as text.
    before: metrics of the run by name, hashes of weights among them.
    again: the same, computed again.
  """

  changed: list[str]
  before: dict[str, Any]
  again: dict[str, Any]

  def differing(self) -> list[str]:
    """Returns the names of the metrics that differ, in any bit."""
    names = sorted(self.before.keys() | self.again.keys())
    return [name for name in names if self.before.get(name) != self.again.get(name)]


def main(arguments: Sequence[str]) -> int:
  """Replays a step and prints the comparison; returns 0 if it is the same to the bit, else 1."""
  parser = argparse.ArgumentParser(prog='segjax replay', description=__doc__)
  parser.add_argument('run', type=Path, help='working directory of the run')
  parser.add_argument('step', type=int, help='step of the stage, from 1')
  parser.add_argument('--stage', default='ppo', help='a stage that trains; default ppo')
  flags = parser.parse_args(arguments)
  try:
    compared = replay(flags.run, flags.step, flags.stage)
  except UserError as error:
    if os.environ.get('SEGJAX_TRACEBACK'):
      raise
    print(f'segjax replay: {one_line(error)}', file=sys.stderr)
    return 1
  return report(compared, f'step {flags.step} of {flags.stage}')


def replay(run: Path, step: int, name: str = 'ppo') -> Comparison:
  """Computes a step of a stage again.

  Args:
    run: working directory of the run.
    step: from 1.
    name: of a stage that trains.

  Raises:
    UserError: the run has no such stage or step, or its inputs are gone.
  """
  before = _metrics(run / name, step)
  stage = _find_stage(run.resolve(), name)
  key = stage_record.stored_key(stage.directory)
  now = json.loads(json.dumps(stage_key.make_key(stage, JOBS[name])))
  with tempfile.TemporaryDirectory() as directory:
    own = _own_stage(stage, Path(directory) / name, key, step)
    with jax.set_mesh(stage.mesh), contextlib.suppress(LastStepReached):
      JOBS[name].run(own, JOBS[name].load(own))
    again = _metrics(own.directory, step)
  return Comparison(stage_record.changed_keys(key, now), before, again)


def report(compared: Comparison, what: str) -> int:
  """Prints a comparison; returns 0 if both are the same to the bit, else 1."""
  if compared.changed:
    log(f'not as the run had it: {", ".join(compared.changed)}')
  names = compared.differing()
  hashes = [name.removeprefix(HASHES) for name in compared.again if name.startswith(HASHES)]
  if not any(name.startswith(HASHES) for name in compared.before):
    log('the run has stored no hashes of weights')
  if not names:
    count = len(compared.again) - len(hashes)
    log(f'{what} is the same to the bit: weights of {", ".join(hashes)}, and {count} metrics')
    return 0
  rows = [
    (name, *(str(values.get(name, '')) for values in (compared.before, compared.again)))
    for name in names[:_MAX_SHOWN]
  ]
  table(f'{what}: {len(names)} of {len(compared.again)} differ', ('', 'run', 'again'), rows)
  return 1


def _metrics(directory: Path, step: int) -> dict[str, Any]:
  """Returns what a stage has logged of a step, but times."""
  rows = {row.get('step'): row for row in read_json_lines(directory / METRICS_FILE)}
  if step - 1 not in rows:
    last = max((index for index in rows if isinstance(index, int)), default=-1) + 1
    if not last:
      raise UserError(f'{directory} has no steps; name a working directory, and a --stage of it.')
    raise UserError(f'{directory / METRICS_FILE} has no step {step}; name one from 1 to {last}.')
  return {k: v for k, v in rows[step - 1].items() if not k.startswith(_NOT_COMPARED)}


def _find_stage(run: Path, name: str) -> Stage:
  """Returns a stage as its command had it."""
  record = stage_history.read(run).get(name)
  if record is None:
    raise UserError(f'{run / stage_history.FILE} does not know how {name} was run.')
  settings = parse.from_config(ConfigDict(_with_tuples(record.config)))
  mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
  stages = {stage.name: stage for stage in pipeline.prepare(settings, run, mesh)}
  return with_template_date(stages[name])


def _with_tuples(value: Any) -> Any:
  """Returns settings as they were before JSON made lists of their tuples."""
  if isinstance(value, dict):
    return {name: _with_tuples(item) for name, item in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _own_stage(stage: Stage, directory: Path, key: stage_record.Key, step: int) -> Stage:
  """Returns the stage in a directory of its own, with the latest training state before the step."""
  directory.mkdir(parents=True)
  # Before a state is restored, its run is compared with this one.
  (directory / stage_record.FILE).write_text(json.dumps({'key': key}), encoding='utf-8')
  states = Path(checkpoint_dir(stage))
  saved = [int(p.name) for p in states.glob('*') if p.name.isdigit() and int(p.name) < step]
  if saved:
    shutil.copytree(states / str(max(saved)), directory / CHECKPOINTS / str(max(saved)))
  changes = {'checkpoint.directory': '', 'checkpoint.every_minutes': 0.0, 'wandb_project': ''}
  settings = replace(stage.settings, **changes, **{'checkpoint.every_steps': 0})
  return dataclasses.replace(stage, directory=directory, settings=settings, last_step=step)
