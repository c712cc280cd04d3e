"""The description of a job, which the pipeline, the dry run and the planner read."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from segjax.config.reward_lines import reward_functions, reward_models, with_paths
from segjax.config.settings import Settings
from segjax.data.source_list import parse_sources
from segjax.errors import UserError
from segjax.plan.phases import JobPlan
from segjax.run.stage import Stage

Results = dict[str, Any]  # what a job returns; goes into stage.json


def always(settings: Settings) -> bool:
  """Returns True: `is_required` of an `Input` that every run needs."""
  return True


def never(settings: Settings) -> bool:
  """Returns False: `is_required` of an optional `Input`."""
  return False


@dataclasses.dataclass(frozen=True)
class Input:
  """A config key that names a checkpoint or rows.

  Attributes:
    key: such as 'policy.path'.
    sources: where its value comes from; the first source that exists is used. 'config.KEY' is a
      value set by the user, 'JOB/PATH' the output of an earlier stage of the same run. Without
      sources, the value is the user's.
    only_after: jobs; if none is among the earlier stages, only the user's value is used.
    is_required: (settings) -> whether the job cannot run without it.
    is_read: (settings) -> whether the job would read it; if not, no earlier stage provides it.
    keywords: values that are not paths.
    is_list: the value holds sources as `data.source_list` describes them.
    is_rows: the value names rows, not a checkpoint.
  """

  key: str
  sources: tuple[str, ...] = ()
  only_after: tuple[str, ...] = ()
  is_required: Callable[[Settings], bool] = always
  is_read: Callable[[Settings], bool] = always
  keywords: tuple[str, ...] = ()
  is_list: bool = False
  is_rows: bool = False

  def paths(self, value: str) -> dict[str, str]:
    """Returns the paths of a value by name: `key`, or `key[0]`, `key[1]`, ... of several.

    Raises:
      UserError: a pattern in the value matches no file.
    """
    try:
      paths = [source.path for source in parse_sources(value)] if self.is_list else [value]
    except UserError as error:
      raise UserError(f'config.{self.key}: {error}') from error
    if len(paths) == 1:
      return {self.key: paths[0]}
    return {f'{self.key}[{number}]': path for number, path in enumerate(paths)}

  def with_path(self, value: str, path: str, other: str) -> str:
    """Returns the value with `other` in place of a path, where it holds one."""
    return other


@dataclasses.dataclass(frozen=True)
class RewardsInput(Input):
  """The reward models of config.rewards."""

  key: str = 'rewards'
  is_required: Callable[[Settings], bool] = never

  def paths(self, value: tuple[str, ...]) -> dict[str, str]:
    """Returns the path of each line that names a reward model."""
    return {line.key: line.path for line in reward_models(value)}

  def with_path(self, value: tuple[str, ...], path: str, other: str) -> tuple[str, ...]:
    """Returns the lines with `other` in place of a path."""
    return with_paths(value, {path: other})


LISTED_REWARDS = RewardsInput()


@dataclasses.dataclass(frozen=True)
class Job:
  """A job: what it reads, writes, prints and costs.

  Attributes:
    name: its name in config.stages; also the stage's directory.
    run: (stage, what `load` returns) -> results; does the work. Without `load`: (stage) -> results.
    sections: the sections of the settings that determine its results.
    without_effect: keys in these sections that do not.
    inputs: the checkpoints and rows that it reads.
    load: reads all of them but weights, and writes nothing. It runs before an earlier output of the
      stage is moved away, and on the first rows before the first stage and in a dry run.
    functions: (settings) -> keys of the user's functions that it calls, but those of
      config.rewards, which all jobs call that have it among their sections.
    outputs: files and directories that it writes, relative to the stage's directory.
    rewrites: (key, file), if it writes a file into the directory of one of its inputs.
    has_files: whether it writes files, which a run with the same settings and inputs reuses.
    batch_keys: keys of batch sizes that are divided over the devices.
    summary: keys of the results that the stage's last line shows.
    print_table: (results) -> None, called at the end of the run.
    after_run: (stage, results of all stages, time.monotonic() at the start) -> None, called at
      the end of the run.
    num_networks: (settings) -> networks that it holds at once, trained and frozen.
    tokens_per_step: (settings) -> maximum number of tokens in a step, prompts and responses; None
      for a job without steps.
    num_steps: (settings, number of rows) -> number of steps; 0 means unknown in both.
    describe_rows: (settings) -> a sentence on the rows for a dry run; '' for nothing.
    passes: (settings) -> passes of a token through a network; an update counts as three.
    headline: (stage, results) -> what the run has reached, in one sentence; '' for nothing.
    plan: the programs that `tools/plan.py` compiles for it.
  """

  name: str
  run: Callable[..., Results]
  sections: tuple[str, ...]
  without_effect: tuple[str, ...] = ()
  inputs: tuple[Input, ...] = ()
  load: Callable[[Stage], Any] | None = None
  functions: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
  outputs: tuple[str, ...] = ()
  rewrites: tuple[str, str] | None = None
  has_files: bool = True
  batch_keys: tuple[str, ...] = ()
  summary: tuple[str, ...] = ()
  print_table: Callable[[Results], None] | None = None
  after_run: Callable[[Stage, dict[str, Results], float], None] | None = None
  num_networks: Callable[[Settings], int] = lambda settings: 1
  tokens_per_step: Callable[[Settings], int] | None = None
  num_steps: Callable[[Settings, int], int] | None = None
  describe_rows: Callable[[Settings], str] = lambda settings: ''
  passes: Callable[[Settings], float] = lambda settings: 1.0
  headline: Callable[[Stage, Results], str] | None = None
  plan: JobPlan | None = None


def function_paths(job: Job, settings: Settings) -> dict[str, str]:
  """Returns the user's functions that the job calls, as 'module:function' by config key."""
  paths = {key: operator.attrgetter(key)(settings) for key in job.functions(settings)}
  if LISTED_REWARDS.key in job.sections:
    paths |= {line.key: line.fn for line in reward_functions(settings.rewards)}
  return {key: path for key, path in paths.items() if path}


COMMON = ('seed', 'runtime', 'data')  # sections of every job that runs a network on data
# Of every job that samples responses and rewards them as PPO does.
REWARDED = (
  *('policy', 'reference', 'reward_model', 'rollout', 'reward_shaping', 'ppo', 'compat'),
  'rewards',
)

POLICY = Input('policy.path', ('sft/model', 'config.policy.path', 'demo/model'))
TRAINED_POLICY = Input('policy.path', ('ppo/model', 'dpo/model', *POLICY.sources))
# The policy before PPO or DPO, unless the user names another one.
REFERENCE = Input('reference.path', ('config.reference.path', *POLICY.sources))


def needs_reward_model(settings: Settings) -> bool:
  """Returns whether the rewards of PPO use a reward model, not a function alone."""
  return settings.reward_shaping.reward_model_weight != 0


REWARD_MODEL = Input('reward_model.path', ('reward/model', 'config.reward_model.path'))
OPTIONAL_REWARD_MODEL = dataclasses.replace(REWARD_MODEL, is_required=needs_reward_model)


def uses_lm_reward(settings: Settings) -> bool:
  """Returns whether a language model rewards the tokens of PPO."""
  return settings.reward_shaping.lm_reward.kind != 'off'


def more_rewarding_models(settings: Settings) -> int:
  """Returns how many models reward the tokens of PPO beside that of config.reward_model."""
  return uses_lm_reward(settings) + len(reward_models(settings.rewards))


_LM_REWARD = 'reward_shaping.lm_reward.path'
LM_REWARD = Input(
  _LM_REWARD,
  (f'config.{_LM_REWARD}', 'dpo/model'),
  is_required=uses_lm_reward,
  is_read=uses_lm_reward,
)


def data_input(rows: str, is_required: Callable[[Settings], bool] = always) -> Input:
  """Returns the input of rows: config.data.path, or these rows of the built-in language."""
  sources = ('config.data.path', f'demo/rows/{rows}.jsonl.gz')
  return Input('data.path', sources, is_required=is_required, is_list=True, is_rows=True)
