"""How a model came about: the record, the curves and the card that stand beside its weights.

Nothing here decides what a later run does: `reuse.content_hash` leaves these files out.
"""

import dataclasses
import importlib.metadata
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import segjax
from segjax import processes
from segjax.data.sources import is_hub_id
from segjax.hf.model_card import Card
from segjax.report import charts
from segjax.report.metric_log import METRICS_FILE
from segjax.run.stage import Stage

PACKAGES = ('jax', 'flax', 'transformers', 'optax', 'orbax-checkpoint')


def card(stage: Stage, figures: dict[str, Any], dataset: Any, show: Sequence[str]) -> Card:
  """The card of the model that the stage has made; base model and licence come from its source.

  Args:
    figures: the last metrics by name; None for one that is not known.
    dataset: what it was trained on, with `counts['rows']` and a length.
    show: the metrics whose curves are drawn.
  """
  s = stage.settings
  if not processes.is_first():  # only the first process writes
    return Card()
  recipe = stage.command.config or f'seed {s.seed}, settings in segjax_config.json'
  known = {name: float(value) for name, value in figures.items() if value is not None}
  return Card(
    stage=stage.name,
    recipe=recipe,
    metrics=known,
    dataset=s.data.path,
    record=record(stage, recipe, known, dataset),
    curves=_curves(stage, show),
  )


def record(stage: Stage, recipe: str, figures: dict[str, Any], dataset: Any) -> dict[str, Any]:
  """All that is known of how the stage made its model, as JSON has it."""
  s = stage.settings
  paths = {name: getattr(s, name).path for name in ('policy', 'reference', 'reward_model')}
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
    'metrics': {k: v if math.isfinite(v) else str(v) for k, v in figures.items()},
    'versions': versions(),
    'commit': commit(),
    'devices': {
      'kind': stage.mesh.devices.flat[0].device_kind,
      'count': stage.mesh.size,
      'processes': jax.process_count(),
    },
    'settings': dataclasses.asdict(s),
  }


def versions() -> dict[str, str]:
  """Of segjax and of the packages that decide its numbers."""
  found = {'segjax': segjax.__version__}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'unknown'
  return found


def commit(package: Path = Path(segjax.__file__).parent) -> str:
  """The git commit of the checkout that `package` lies in, '-dirty' added if files were changed.

  '' for an installed package, also where that lies within a repository of somebody else, and where
  there is no git.
  """
  top = _git(package.parent, 'rev-parse', '--show-toplevel')
  if not top or not Path(top).samefile(package.parent):
    return ''
  return _git(package.parent, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')


def _git(directory: Path, *arguments: str) -> str:
  """What a git command prints, '' where it fails."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  command = ['git', '--no-optional-locks', '-C', str(directory), *arguments]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, env=environment, timeout=30, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return ''
  return done.stdout.strip()


def _curves(stage: Stage, show: Sequence[str]) -> bytes:
  try:
    return charts.card_png(stage.directory / METRICS_FILE, show)
  except Exception as error:  # a picture is not worth the model that waits to be written
    stage.log(f'no curves for the model card: {error!r}')
    return b''
