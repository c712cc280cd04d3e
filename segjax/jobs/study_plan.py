"""Checks a study before anything runs: its arms, seeds and runs, and that it is the directory's."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segjax.config import parse
from segjax.config.settings import Settings, replace
from segjax.config.study_arms import (
  Arm,
  Overrides,
  check_study,
  parse_seeds,
  select_arms,
  tuning_trials,
)
from segjax.errors import UserError
from segjax.jobs import study_tuning
from segjax.jobs.study_graph import Cell, Graph
from segjax.jobs.study_tuning import Constants, Trial
from segjax.run.stage import Stage
from segjax.storage import write_text_atomically

_IDENTITY_FILE = 'study.json'  # in the working directory


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a study runs.

  Attributes:
    settings: of the study; what its runs start from.
    graph: makes the runs.
    arms: the baseline first.
    seeds: that are shown.
    trials: points of the grid that each arm tries first; [] if nothing is tuned.
    constants: that an earlier study has chosen.
    levels: of KL, the main one first.
  """

  settings: Settings
  graph: Graph
  arms: list[Arm]
  seeds: list[int]
  trials: list[Overrides]
  constants: Constants
  levels: list[str]

  def cells(self, constants: Constants) -> list[Cell]:
    """Returns the cells that are shown; all arms of a seed before the next seed."""
    return [
      self.graph.cell(arm, language, seed, constants.get((language, arm.name)))
      for seed in self.seeds
      for language in self.settings.study.languages
      for arm in self.arms
    ]

  @property
  def tuning_seeds(self) -> list[int]:
    """Seeds of the trials; [] if nothing is tuned."""
    study = self.settings.study
    return parse_seeds(study.tuning_seeds, 'tuning_seeds') if study.trials else []

  def trial_cells(self) -> dict[Trial, list[Cell]]:
    """Returns the cells of each trial, one for each of the tuning seeds."""
    languages, seeds = self.settings.study.languages, self.tuning_seeds
    trained = [arm for arm in self.arms if arm.is_trained]
    return {
      (language, arm.name, number): [self.graph.cell(arm, language, seed, trial) for seed in seeds]
      for language, arm, (number, trial) in itertools.product(
        languages, trained, enumerate(self.trials)
      )
    }


def load(stage: Stage) -> Plan:
  """Checks the study and the settings of all of its runs.

  Raises:
    UserError: an arm contradicts itself, there are too few seeds, the working directory holds
      another study, ...
  """
  # The built-in languages' template reads no date, and runs of another day must have equal hashes.
  s = replace(stage.settings, **{'data.template_date': ''})
  if s.stages != ('study',):
    raise UserError(
      f'config.stages={",".join(s.stages)}: a study makes runs of its own; use stages=study.'
    )
  if not s.evaluate.gold_reward_fn:
    raise UserError(
      'config.evaluate.gold_reward_fn is empty, and a study compares gold rewards; set it to '
      'segjax.data.languages:gold.'
    )
  check_study(s.study)
  arms, workdir = select_arms(s.study), stage.directory.parent
  _check_identity(workdir, s, arms)
  main = s.study.main_level
  levels = [main, *(level for level in s.study.kl_levels if level != main)]
  constants: Constants = {}
  if s.study.tuning_file:
    path = Path(s.study.tuning_file).expanduser()
    constants = study_tuning.read(path, arms, s.study.languages)
  runs = Path(s.study.runs).expanduser() if s.study.runs else workdir / 'runs'
  seeds = parse_seeds(s.study.seeds, 'seeds')
  plan = Plan(s, Graph(s, runs), arms, seeds, tuning_trials(s.study), constants, levels)
  _check_distinct(plan.cells(constants))
  plan.trial_cells()
  return plan


def _check_distinct(cells: Sequence[Cell]) -> None:
  """Raises UserError if two arms are one: all of their settings that are read are equal."""
  arms: dict[Path, str] = {}
  for cell in cells:
    other = arms.setdefault(cell.node.directory, cell.arm.name)
    if other != cell.arm.name:
      raise UserError(
        f'config.study.arms: {other!r} and {cell.arm.name!r} have the same settings, so there is '
        'nothing to compare; remove one of them.'
      )


def _identity(settings: Settings, arms: Sequence[Arm]) -> dict[str, Any]:
  """Returns what all commands of one study have in common, by name."""
  values = parse.changed_values(settings)
  values.pop('data.max_rows', None)  # of the check before the run, on the first rows
  shared = {key: value for key, value in values.items() if key.partition('.')[0] != 'study'}
  lines = {f'arm {arm.name}': [arm.overrides, arm.stages] for arm in arms}
  return json.loads(json.dumps(shared | {'baseline': arms[0].name} | lines))


def _check_identity(workdir: Path, settings: Settings, arms: Sequence[Arm]) -> None:
  """Raises UserError if the working directory holds a study that this one does not go on with."""
  path = workdir / _IDENTITY_FILE
  if not path.exists():
    return
  try:
    stored = json.loads(path.read_text(encoding='utf-8'))
  except ValueError:
    return  # a kill cannot damage it, and what it guards is found by hashes
  now = _identity(settings, arms)
  both = [key for key in now if key in stored or not key.startswith('arm ')]
  keys = [key for key in both if stored.get(key) != now[key]]
  keys += [key for key in stored if key not in now and not key.startswith('arm ')]
  if keys:
    raise UserError(
      f'--workdir={workdir} holds another study: {", ".join(keys[:3])} differ; use another one.'
    )


def write_identity(workdir: Path, settings: Settings, arms: Sequence[Arm]) -> None:
  """Records which study the working directory holds."""
  text = json.dumps(_identity(settings, arms), indent=2) + '\n'
  write_text_atomically(workdir / _IDENTITY_FILE, text)
