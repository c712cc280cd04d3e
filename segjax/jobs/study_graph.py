"""The runs of a study: which command each one is, what it needs, what several arms share.

base         demo, sft            once per language and seed
reward       reward               once per distinct settings of the reward model
normalizer   normalizer           on a copy of the reward model, into which it writes
cell         ppo, evaluate        an arm's own

A run is identified by a hash of the settings that its jobs read, with those of the runs it needs:
equal ones are one run, and a finished one is never repeated.
"""

import dataclasses
import hashlib
import json
import pprint
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

from segjax.config import parse
from segjax.config.settings import Settings, replace
from segjax.config.study_arms import (
  Arm,
  Overrides,
  child_settings,
  resolve,
)
from segjax.jobs import demo, evaluate, normalizer, ppo, reward, sft
from segjax.jobs.job import function_paths
from segjax.run import source_code
from segjax.storage import atomic_directory, make_directory, write_text_atomically
from segjax.train.user_functions import load_function

JOBS = {
  job.name: job for job in (demo.JOB, sft.JOB, reward.JOB, normalizer.JOB, ppo.JOB, evaluate.JOB)
}
BASE = ('demo', 'sft')
COPY = 'reward_model'  # of the reward model, in the directory of its normaliser
_SECTIONS = {section for job in JOBS.values() for section in job.sections}
_CONFIG = '''"""One run of a study: {name}.

  python -m segjax.main --config={path} --workdir={directory}
"""

from segjax.config import presets

VALUES = {values}


def get_config():
  """Returns the settings of the run."""
  config = presets.default_config()
  config.update_from_flattened_dict(VALUES)
  return config
'''


@dataclasses.dataclass(frozen=True, eq=False)  # `Graph` makes each distinct run once
class Node:
  """A run of a study.

  Attributes:
    kind: base, reward, normalizer or cell.
    name: for messages, such as 'reward describe seed 3'.
    directory: of the run; its name ends in the hash of what determines the results.
    settings: of the run.
    needs: the runs whose models it reads.
  """

  kind: str
  name: str
  directory: Path
  settings: Settings
  needs: tuple['Node', ...] = ()

  @property
  def config_file(self) -> Path:
    """The config of the run, which a person can run by hand too."""
    return self.directory / 'config.py'

  def prepare(self) -> None:
    """Writes the config, and copies the reward model that the run writes into."""
    make_directory(self.directory)
    values = pprint.pformat(run_values(self.settings), width=90)
    text = _CONFIG.format(
      name=self.name, path=self.config_file, directory=self.directory, values=values
    )
    write_text_atomically(self.config_file, text)
    copy = self.directory / COPY
    if self.kind == 'normalizer' and not copy.exists():
      with atomic_directory(copy) as partial:
        shutil.copytree(self.needs[-1].directory / 'reward' / 'model', partial, dirs_exist_ok=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """An arm on a seed of a language, or one of its trials.

  Attributes:
    overrides: what it changes of the study's settings, tuned constants included.
    base: the run that made rows and SFT model.
    reward: the run that trained its reward model; None where the reward is a function.
    node: the cell's own run.
  """

  arm: Arm
  language: str
  seed: int
  overrides: Overrides
  base: Node
  reward: Node | None
  node: Node

  @property
  def nodes(self) -> tuple[Node, ...]:
    """All runs that it needs and its own, in their order."""
    return tuple(dict.fromkeys((*self.node.needs, self.node)))


def run_values(settings: Settings) -> Overrides:
  """Returns the values of a run's config: what differs from the defaults and its jobs read."""
  used = {section for stage in settings.stages for section in JOBS[stage].sections}
  values = parse.changed_values(settings)
  return {k: v for k, v in values.items() if k.partition('.')[0] not in _SECTIONS - used}


class Graph:
  """Makes the runs of cells, each distinct one once.

  Args:
    settings: of the study.
    runs: the directory of all runs.
  """

  def __init__(self, settings: Settings, runs: Path):
    self._settings, self._runs = settings, runs.absolute()
    self._nodes: dict[Path, Node] = {}
    self._checked: dict[str, Settings] = {}

  def cell(self, arm: Arm, language: str, seed: int, constants: Overrides | None = None) -> Cell:
    """Returns the cell of an arm with some constants; what the arm itself sets stays.

    Raises:
      UserError: the settings of one of its runs contradict each other.
    """
    overrides = (constants or {}) | arm.overrides
    full = replace(self._whole_run(arm, language, overrides), seed=seed)
    where = f'{language} seed {seed}'
    base = self._node('base', where, replace(full, stages=BASE), {}, ())
    sft, rows = str(base.directory / 'sft' / 'model'), base.directory / 'demo' / 'rows'
    pairs = {'data.path': str(rows / 'pairs.jsonl.gz'), 'reference.path': sft}
    paths = {
      'policy.path': sft,
      'reference.path': sft,
      'data.path': str(rows / 'prompts.jsonl.gz'),
      'evaluate.data.path': str(rows / 'held_out.jsonl.gz'),
    }
    needs, reward = (base,), None
    if full.reward_shaping.reward_model_weight:
      settings = replace(full, stages=('reward',))
      reward = self._node('reward', where, settings, pairs | {'policy.path': sft}, (base,))
      settings = replace(full, stages=('normalizer',))
      copy = self._node('normalizer', where, settings, pairs, (base, reward))
      needs = (base, reward, copy)
      paths['reward_model.path'] = str(copy.directory / COPY)
    name = f'{arm.name} {where}'
    node = self._node('cell', name, replace(full, stages=arm.stages), paths, needs)
    return Cell(arm, language, seed, overrides, base, reward, node)

  def _whole_run(self, arm: Arm, language: str, overrides: Overrides) -> Settings:
    """Returns the settings of a run of all stages, in which all contradictions are seen."""
    key = json.dumps([arm.name, language, overrides], sort_keys=True)
    if key not in self._checked:
      values = resolve(overrides, self._settings) | {'demo.language': language}
      has_model = values.get('reward_shaping.reward_model_weight') != 0
      values['stages'] = (*BASE, *(('reward', 'normalizer') if has_model else ()), *arm.stages)
      settings = child_settings(self._settings, values, f'arm {arm.name!r}')
      for name, path in _functions(settings).items():
        load_function(path, name)
      self._checked[key] = settings
    return self._checked[key]

  def _node(
    self, kind: str, name: str, settings: Settings, paths: Overrides, needs: tuple[Node, ...]
  ) -> Node:
    """Returns the run of these settings, which is identified by them without the paths."""
    read = {
      stage: {section: _as_json(attrgetter(section)(settings)) for section in JOBS[stage].sections}
      for stage in settings.stages
    }
    sources = {k: source_code.hash_function(path) for k, path in _functions(settings).items()}
    parts = [read, sources, [node.directory.name for node in needs]]
    text = json.dumps(parts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    directory = self._runs / f'{kind}-{settings.seed}-{digest}'
    if kind == 'normalizer':
      paths = paths | {'reward_model.path': str(directory / COPY)}
    node = Node(kind, f'{kind} {name}', directory, replace(settings, **paths), needs)
    return self._nodes.setdefault(directory, node)


def _functions(settings: Settings) -> dict[str, str]:
  """Returns the user's functions that the run's jobs call, as 'module:function' by key."""
  paths: dict[str, str] = {}
  for stage in settings.stages:
    paths |= function_paths(JOBS[stage], settings)
  return paths


def _as_json(section: Any) -> Any:
  return dataclasses.asdict(section) if dataclasses.is_dataclass(section) else section
