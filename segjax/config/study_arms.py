"""Reads what a study compares: its arms, seeds, languages, and the constants that it tunes.

An arm is a line 'NAME KEY=VALUE KEY=VALUE ...' of the config. The values {gold} and {boundary} are
those of config.evaluate.gold_reward_fn and evaluate.boundary_fn. rewards=NAME+NAME takes these
lines of config.rewards alone, rewards=none takes none.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from segjax.config import parse
from segjax.config.choices import LANGUAGES
from segjax.config.field_checks import check_choice
from segjax.config.lines import parse_value, read_lines
from segjax.config.load import load_settings
from segjax.config.settings import Settings, Study
from segjax.errors import UserError

Overrides = dict[str, Any]  # settings by dotted key

FIRST_TUNING_SEED = 100  # what is tuned on a seed is never judged by it
MIN_SEEDS = 3  # of an interval over seeds
# What a study sets by itself in each of its runs.
_OWN_KEYS = ('seed', 'demo.language', 'policy.path', 'reference.path', 'reward_model.path')


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
  """One side of a comparison: what it changes of the study's settings.

  Attributes:
    stages: of its runs: without ppo, the SFT model itself is evaluated.
  """

  name: str
  overrides: Overrides
  stages: tuple[str, ...] = ('ppo', 'evaluate')

  @property
  def is_trained(self) -> bool:
    """Whether the arm trains a policy, with constants to tune."""
    return 'ppo' in self.stages

  @property
  def is_yardstick(self) -> bool:
    """Whether the arm is no method: it trains nothing, or its reward is not of a reward model."""
    return not self.is_trained or self.overrides.get('reward_shaping.reward_model_weight') == 0


def parse_arms(lines: Iterable[str]) -> list[Arm]:
  """Returns the arms of lines 'NAME KEY=VALUE ...'.

  Raises:
    UserError: a name occurs twice, or a key does not exist.
  """
  arms = []
  for name, words in read_lines(lines, 'study.arms').items():
    overrides = {key: _parse_override(name, key, text) for key, text in words.items()}
    stages = overrides.pop('stages', None)
    arm = Arm(name, overrides, tuple(str(stages).split('+')) if stages else Arm.stages)
    if arm.stages not in (Arm.stages, ('evaluate',)):
      raise UserError(
        f'config.study.arms: {name}: stages={stages} must be ppo+evaluate, or evaluate alone.'
      )
    arms.append(arm)
  return arms


def select_arms(study: Study) -> list[Arm]:
  """Returns the arms of a study that run, the baseline first.

  Raises:
    UserError: there are fewer than two, or a name is none of them.
  """
  arms = {arm.name: arm for arm in parse_arms(study.arms)}
  for name in study.only:
    check_choice('config.study.only', name, tuple(arms))
  baseline = study.baseline or next(iter(arms), '')
  chosen = [name for name in arms if not study.only or name in study.only or name == baseline]
  if len(chosen) < 2:
    raise UserError(
      f'config.study.arms leaves {len(chosen)} arm(s) to compare; write two or more, each as '
      "'NAME KEY=VALUE ...'."
    )
  check_choice('config.study.baseline', baseline, tuple(arms))
  if arms[baseline].is_yardstick:
    raise UserError(
      f'config.study.baseline={baseline} is a yardstick, not a method; name another arm.'
    )
  return [arms[baseline], *(arms[name] for name in chosen if name != baseline)]


def parse_override(key: str, text: str) -> Any:
  """Returns the value of a setting from its text, as after --config.KEY= on the command line.

  Raises:
    UserError: there is no such setting.
  """
  parse.check_key(key)
  return parse_value(text)


def _parse_override(arm: str, key: str, text: str) -> Any:
  if key in _OWN_KEYS or key.startswith('study.'):
    raise UserError(f'config.study.arms: {arm}: {key} is set by the study itself; remove it.')
  try:
    return parse_override(key, text)
  except UserError as error:
    raise UserError(f'config.study.arms: {arm}: {error}') from error


def parse_seeds(values: Sequence[str], key: str) -> list[int]:
  """Returns the seeds of '0:9', both ends included, or of '0,3,7'.

  Raises:
    UserError: a seed is no number, or occurs twice.
  """
  seeds: list[int] = []
  for value in values:
    first, colon, last = value.partition(':')
    if not (first.isdecimal() and (last.isdecimal() or not colon)):
      raise UserError(f'config.study.{key}={value!r} is no seed; use FIRST:LAST, or 0,3,7.')
    seeds += range(int(first), int(last or first) + 1)
  if not seeds or len(set(seeds)) < len(seeds):
    problem = 'names a seed twice' if seeds else 'names no seed'
    raise UserError(f'config.study.{key}={",".join(values)} {problem}; use FIRST:LAST, or 0,3,7.')
  return seeds


def check_study(study: Study) -> None:
  """Checks seeds, languages and levels.

  Raises:
    UserError: names the key and the fix.
  """
  seeds = parse_seeds(study.seeds, 'seeds')
  if len(seeds) < MIN_SEEDS:
    raise UserError(
      f'config.study.seeds={",".join(study.seeds)} are {len(seeds)} seed(s), and an interval over '
      f'seeds needs {MIN_SEEDS} or more; 10 for a claim.'
    )
  if max(seeds) >= FIRST_TUNING_SEED:
    raise UserError(
      f'config.study.seeds={",".join(study.seeds)}: seeds from {FIRST_TUNING_SEED} on are those of '
      f'tuning; use seeds below {FIRST_TUNING_SEED}.'
    )
  if study.trials and min(parse_seeds(study.tuning_seeds, 'tuning_seeds')) < FIRST_TUNING_SEED:
    raise UserError(
      f'config.study.tuning_seeds={",".join(study.tuning_seeds)}: seeds below {FIRST_TUNING_SEED} '
      f'are those that are shown; use {FIRST_TUNING_SEED} or more.'
    )
  if study.trials and not study.grid:
    raise UserError(
      f'config.study.trials={study.trials} without a config.study.grid tries nothing; write '
      "'KEY=VALUE|VALUE' for each constant, or set trials to 0."
    )
  if study.trials and study.tuning_file:
    raise UserError(
      f'config.study.trials={study.trials} and study.tuning_file={study.tuning_file} both choose '
      'constants; set one of them to 0 or empty.'
    )
  if not study.languages:
    raise UserError(f'config.study.languages is empty; use names out of {", ".join(LANGUAGES)}.')
  for name in study.languages:
    check_choice('config.study.languages', name, LANGUAGES)
  check_choice('config.study.main_level', study.main_level, study.kl_levels)
  kl_levels(study)


def kl_levels(study: Study) -> list[float]:
  """Returns the levels of KL, in nats; UserError if one is not a positive number."""
  try:
    levels = [float(level) for level in study.kl_levels]
  except ValueError:
    levels = [0.0]
  if min(levels) <= 0:
    raise UserError(
      f'config.study.kl_levels={",".join(study.kl_levels)} must be positive numbers: nats.'
    )
  return levels


def tuning_trials(study: Study) -> list[Overrides]:
  """Returns the points of the grid that every arm tries, the same for all.

  All of them where the grid has no more. Else they are drawn one by one, each among the points
  whose values have been drawn the fewest times, so that every value of a constant is tried.
  """
  axes = []
  for line in study.grid:
    key, _, values = line.partition('=')
    axes.append([(key.strip(), parse_override(key.strip(), v)) for v in values.split('|')])
  points = [dict(point) for point in itertools.product(*axes)]
  if len(points) <= study.trials:
    return points
  left = [points[index] for index in np.random.default_rng(0).permutation(len(points))]
  chosen: list[Overrides] = []
  drawn: collections.Counter = collections.Counter()
  while len(chosen) < study.trials:
    chosen.append(min(left, key=lambda point: sum(drawn[item] for item in point.items())))
    left.remove(chosen[-1])
    drawn.update(chosen[-1].items())
  return chosen


def resolve(overrides: Overrides, settings: Settings) -> Overrides:
  """Returns the overrides with the functions of the settings in place of {gold} and {boundary}.

  Names of `rewards` are replaced by their lines in config.rewards.

  Raises:
    UserError: config.rewards has no such line.
  """
  evaluate = settings.evaluate
  functions = {'{gold}': evaluate.gold_reward_fn, '{boundary}': evaluate.boundary_fn}
  overrides = {k: functions.get(v, v) if isinstance(v, str) else v for k, v in overrides.items()}
  if isinstance(names := overrides.get('rewards'), str):
    lines = {line.split()[0]: line for line in settings.rewards}
    chosen = [] if names == 'none' else names.split('+')
    for name in chosen:
      check_choice('config.study.arms: rewards', name, (*lines, 'none'))
    overrides['rewards'] = tuple(lines[name] for name in chosen)
  return overrides


def child_settings(settings: Settings, overrides: Overrides, what: str) -> Settings:
  """Returns the checked settings of a run of the study.

  Args:
    settings: of the study.
    overrides: what the run changes of them.
    what: names the run in errors.

  Raises:
    UserError: the settings contradict each other.
  """
  inherited = {k: v for k, v in parse.changed_values(settings).items() if k[:6] != 'study.'}
  try:
    return load_settings(inherited | overrides, {})[0]
  except UserError as error:
    raise UserError(f'{what}: {error}') from error
