"""Describes how a model was trained: the record, curves and model card next to its weights.

These files never change what a later run does: `stage_record.content_hash` skips them.
"""

import dataclasses
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import segjax
from segjax import processes
from segjax.config.reward_lines import reward_models
from segjax.data.sources import is_hub_id
from segjax.hf.model_card import Card
from segjax.report import charts
from segjax.report.metric_log import METRICS_FILE
from segjax.run import source_code
from segjax.run.stage import Stage


def card(stage: Stage, figures: dict[str, Any], dataset: Any, show: Sequence[str]) -> Card:
  """Returns the model card of the stage's model; base model and licence come from its source.

  Args:
    figures: the last metrics by name; None for an unknown one.
    dataset: the training data, with `counts['rows']` and a length.
    show: the metrics whose curves are drawn.
  """
  s = stage.settings
  if not processes.is_first():  # only the first process writes
    return Card()
  recipe = stage.command.config or f'seed {s.seed}, settings in segjax_config.json'
  metrics = {name: float(value) for name, value in figures.items() if value is not None}
  return Card(
    stage=stage.name,
    recipe=recipe,
    metrics=metrics,
    dataset=s.data.path,
    record=record(stage, recipe, metrics, dataset),
    curves=_curves(stage, show),
  )


def record(stage: Stage, recipe: str, metrics: dict[str, float], dataset: Any) -> dict[str, Any]:
  """Returns a description of how the stage trained its model, for JSON."""
  s = stage.settings
  paths = {name: getattr(s, name).path for name in ('policy', 'reference', 'reward_model')}
  paths['lm_reward'] = s.reward_shaping.lm_reward.path
  paths |= {line.name: line.path for line in reward_models(s.rewards)}
  return {
    'stage': stage.name,
    'recipe': recipe,
    'command': stage.command.line,
    'seed': s.seed,
    'data': {
      'path': s.data.path,
      'split': s.data.split,
      'rows': dataset.counts['rows'],
      'used': len(dataset),
    }
    | ({'hub': s.data.path} if is_hub_id(s.data.path) else {}),
    'models': {name: path for name, path in paths.items() if path},
    # JSON has no NaN: a value that is not finite is written as its name.
    'metrics': {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()},
    'versions': source_code.versions(),
    'commit': commit(),
    'devices': {
      'kind': stage.mesh.devices.flat[0].device_kind,
      'count': stage.mesh.size,
      'processes': jax.process_count(),
    },
    'settings': dataclasses.asdict(s),
  }


def commit(package: Path = Path(segjax.__file__).parent) -> str:
  """Returns the git commit of the checkout that holds `package`, with '-dirty' for changed files.

  '' without git and for an installed package, even inside another project's repository.
  """
  top = _git(package.parent, 'rev-parse', '--show-toplevel')
  if not top or not Path(top).samefile(package.parent):
    return ''
  return _git(package.parent, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')


def _git(directory: Path, *arguments: str) -> str:
  """Returns the output of a git command, '' if it fails."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  command = ['git', '--no-optional-locks', '-C', str(directory), *arguments]
  try:
    completed = subprocess.run(
      command, capture_output=True, text=True, env=environment, timeout=30, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return ''
  return completed.stdout.strip()


def _curves(stage: Stage, show: Sequence[str]) -> bytes:
  try:
    return charts.card_png(stage.directory / METRICS_FILE, show)
  except Exception as error:  # a missing picture must not lose the trained model
    stage.log(f'no curves for the model card: {error!r}')
    return b''
