"""Runs the jobs of config.stages in turn, each from the last one's output."""

import dataclasses
import importlib.util
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from segjax import processes
from segjax.config import settings as typed
from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.jobs import (
  answers,
  chat,
  demo,
  evaluate,
  evaluate_reward,
  normalizer,
  ppo,
  reward,
  selfcheck,
  sft,
)
from segjax.model.mesh import check_batch
from segjax.report import profiling
from segjax.report.console import log
from segjax.report.html_report import Page
from segjax.run import inputs, stage_record
from segjax.run.bucket_mirror import NoMirror
from segjax.run.stage import Command, Stage
from segjax.run.training_loop import checkpoint_dir
from segjax.train.custom_reward import load_function
from segjax.train.reward_spec import REWARD_SPEC_FILE as SEGMENT_REWARD


@dataclasses.dataclass(frozen=True)
class Job:
  """A job, and what the pipeline must know of it.

  Attributes:
    run: does the work, returns figures.
    sections: the settings that decide its outcome.
    needs: keys that must name a checkpoint or rows.
    optional: keys that may name one.
    outputs: what it leaves in its directory.
    batches: keys of batches that are split over the devices.
    figures: what of its results stands on its last line.
    is_reusable: whether it need not run again with the same settings and inputs.
  """

  run: Callable[[Stage], dict[str, Any]]
  sections: tuple[str, ...]
  needs: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  outputs: tuple[str, ...] = ()
  batches: tuple[str, ...] = ()
  figures: tuple[str, ...] = ()
  is_reusable: bool = True


_COMMON = ('seed', 'runtime', 'data')
_MODELS = ('policy', 'reference', 'reward_model')
_PATHS = ('policy.path', 'reference.path', 'reward_model.path', 'critic.init', 'data.path')
JOBS = {
  'demo': Job(
    demo.run,
    ('seed', 'demo', 'network'),
    outputs=('model', 'rows'),
    figures=('parameters', 'sft_rows', 'pairs'),
  ),
  'sft': Job(
    sft.run,
    (*_COMMON, 'policy', 'sft'),
    needs=('policy.path', 'data.path'),
    outputs=('model',),
    batches=('sft.batch_size', 'sft.micro_batch_size'),
    figures=('loss',),
  ),
  'reward': Job(
    reward.run,
    (*_COMMON, 'policy', 'reference', 'reward', 'compat'),
    needs=('policy.path', 'reference.path', 'data.path'),
    outputs=('model', 'held_out.json'),
    batches=('reward.batch_size', 'reward.micro_batch_size'),
    figures=('held_out_accuracy',),
  ),
  'normalizer': Job(
    normalizer.run,
    (*_COMMON, 'reference', 'reward_model', 'normalizer', 'compat'),
    needs=('reward_model.path', 'reference.path', 'data.path'),
    batches=('normalizer.batch_size',),
    figures=('segments',),
  ),
  'ppo': Job(
    ppo.run,
    (*_COMMON, *_MODELS, 'critic', 'rollout', 'reward_shaping', 'ppo', 'compat'),
    needs=('policy.path', 'reference.path', 'reward_model.path', 'critic.init', 'data.path'),
    outputs=('model', 'critic'),
    batches=(
      'ppo.rollout_batch_size',
      'ppo.minibatch_size',
      'ppo.micro_batch_size',
      'ppo.scoring_batch_size',
    ),
    figures=('reward', 'kl'),
  ),
  'evaluate': Job(
    evaluate.run,
    (*_COMMON, *_MODELS, 'rollout', 'reward_shaping', 'ppo', 'compat', 'evaluate'),
    needs=('policy.path', 'reference.path', 'reward_model.path', 'data.path'),
    outputs=('results.json',),
    batches=('evaluate.batch_size',),
  ),
  'evaluate_reward': Job(
    evaluate_reward.run,
    (*_COMMON, 'reference', 'reward_model', 'reward_shaping', 'compat', 'evaluate_reward'),
    needs=('reward_model.path', 'data.path'),
    optional=('reference.path', 'evaluate_reward.pairs', 'evaluate_reward.spans'),
    outputs=('results.json',),
    batches=('evaluate_reward.batch_size',),
    figures=('pairs_read', 'responses_read'),
  ),
  'answers': Job(
    answers.run,
    (*_COMMON, 'policy', 'rollout', 'answers'),
    needs=('policy.path', 'data.path'),
    outputs=(answers.DIRECTORY,),
    batches=('answers.batch_size',),
    figures=('answered', 'truncated_prompts'),
  ),
  'selfcheck': Job(selfcheck.run, ('seed',), is_reusable=False),
  'chat': Job(chat.run, ('seed',), is_reusable=False),
}


def run(stages: list[Stage], workdir: Path, started: float, name: str = '') -> dict[str, Any]:
  """Runs the stages of `prepare`; returns their results by name.

  Args:
    started: time.time() of the process's start, for `wall_seconds` of the demo's results.json.
    name: of the config, for report.html.
  """
  results = {}
  with Page(workdir, name, [stage.name for stage in stages]) as page:
    for stage in stages:
      with jax.set_mesh(stage.mesh):
        results[stage.name] = run_stage(dataclasses.replace(stage, refresh=page.refresh))
      page.write()
  if not processes.is_first():
    return results
  for name, job in (('evaluate', evaluate), ('evaluate_reward', evaluate_reward)):
    if name in results:
      log('')
      job.show(results[name])
  if {'demo', 'reward', 'evaluate'} <= set(results):
    demo.write_results(stages[0].settings.seed, workdir, results, started)
  return results


def prepare(
  settings: Settings,
  workdir: Path,
  mesh: Mesh,
  mirrored: NoMirror | None = None,
  command: Command | None = None,
) -> list[Stage]:
  """The stages with their paths; every check that takes no time is made before the first starts.

  Raises:
    ValueError: a batch does not divide over the mesh, a path or function does not exist, ...
  """
  if settings.wandb_project and importlib.util.find_spec('wandb') is None:
    raise UserError("config.wandb_project needs wandb: pip install -e '.[wandb]'.")
  profiling.parse(settings.profile_steps)
  inputs.check_writable(settings.checkpoint.directory)
  stages = []
  for name in settings.stages:
    wired = connect_stages(name, settings, workdir)
    stage = Stage(
      name, wired, workdir / name, mesh, mirrored or NoMirror(), command=command or Command()
    )
    check_batches(name, stage.settings, mesh)
    for key in (*JOBS[name].needs, *JOBS[name].optional):
      for label, path in inputs.named_paths(key, operator.attrgetter(key)(settings)).items():
        inputs.check_path(label, path, stage.directory)
    stages.append(stage)
  if {'ppo', 'evaluate'} & set(settings.stages):
    evaluate.load_eval_functions(settings.evaluate)
  if settings.reward_shaping.reward_fn and {'ppo', 'evaluate'} & set(settings.stages):
    load_function(settings.reward_shaping.reward_fn, 'reward_shaping.reward_fn')
  return stages


def check_batches(job: str, settings: Settings, mesh: Mesh) -> None:
  """ValueError where a batch of the job does not divide over the mesh."""
  for key in JOBS[job].batches:
    if size := operator.attrgetter(key)(settings):
      check_batch(f'config.{key}={size}', size, mesh)


def check_complete(stages: list[Stage]) -> None:
  """ValueError where a path is missing that nobody gives."""
  for stage in stages:
    if missing := missing_keys(stage):
      raise UserError(
        f'config.{missing[0]} is empty, and the {stage.name} job needs it: give a path or a hub id '
        f'by --config.{missing[0]}=...'
      )


def missing_keys(stage: Stage) -> list[str]:
  """The keys that the stage needs and nobody has given; the reference may follow the policy."""
  missing = [key for key in JOBS[stage.name].needs if not operator.attrgetter(key)(stage.settings)]
  scores = stage.name in ('normalizer', 'evaluate_reward')
  if not stage.settings.reward_shaping.reward_model_weight and not scores:
    missing = [key for key in missing if key != 'reward_model.path']
  given = stage.settings.evaluate_reward
  if stage.name == 'evaluate_reward' and (given.pairs or given.spans):
    missing = [key for key in missing if key != 'data.path']
  follows = 'policy.path' in missing and stage.name != 'evaluate'
  return [key for key in missing if not (follows and key == 'reference.path')]


def connect_stages(name: str, settings: Settings, workdir: Path) -> Settings:
  """The settings of a stage of the run: what an earlier stage made takes the place of paths.

  The policy is that of sft or ppo, once they have run; the reference is the policy before PPO,
  unless the config names one. The built-in language gives each stage its rows and, to begin with,
  its network, unless the config names others.
  """
  before = settings.stages[: settings.stages.index(name)]

  def made(stage: str) -> str:
    return str(workdir / stage / 'model') if stage in before else ''

  start = made('sft') or settings.policy.path or made('demo')
  is_alone = name == 'evaluate' and not made('ppo')
  rows = ''
  if 'demo' in before:
    kind = {'sft': 'sft', 'ppo': 'prompts', 'evaluate': 'held_out'}.get(name, 'pairs')
    rows = str(workdir / 'demo' / 'rows' / f'{kind}.jsonl.gz')
  return typed.replace(
    settings,
    **{
      'policy.path': (made('ppo') or start) if name in ('evaluate', 'answers') else start,
      'reference.path': settings.reference.path or ('' if is_alone else start),
      'reward_model.path': made('reward') or settings.reward_model.path,
      'data.path': settings.data.path or rows,
    },
  )


def run_stage(stage: Stage) -> dict[str, Any]:
  """Runs one stage, or reuses what it left before."""
  job, key = JOBS[stage.name], {}
  results = None
  if processes.is_first():
    key = {'settings': _sections(stage, job), 'inputs': _inputs(stage, job)}
    results = _begin(stage, job, key)
  stage.mirror.push_and_wait(stage.directory)
  results = processes.broadcast_from_first(results)
  if results is not None:
    return results
  begun = time.monotonic()
  results = job.run(stage)
  results['seconds'] = time.monotonic() - begun
  processes.barrier(f'{stage.name} done')
  if processes.is_first():
    figures = ''.join(f', {k.replace("_", " ")} {_short(results[k])}' for k in job.figures)
    stage.log(f'done in {results["seconds"]:.1f} s{figures}')
    results = stage_record.record_results(stage.directory, key, results, _outputs(stage, job))
  stage.mirror.push_and_wait()
  if processes.is_first():
    _drop_states(stage)
  return processes.broadcast_from_first(results)


def _drop_states(stage: Stage) -> None:
  """Removes the training states of a finished stage; only once it is known to be finished."""
  if checkpoint_dir(stage).exists():
    checkpoint_dir(stage).rmtree()


def _begin(stage: Stage, job: Job, key: stage_record.Key) -> dict[str, Any] | None:
  """What the stage left before, if that can be reused; else its directory is ready for it."""
  stage_record.restore_old(stage.directory, key)
  results = stage_record.load_results_if_valid(stage.directory, key, _outputs(stage, job))
  if results is not None and job.is_reusable:
    stage.log(f'reused from {stage.directory}: settings and inputs are the same')
    _drop_states(stage)  # a run that was killed at the stage's end has left them
    return results
  log('')
  reason = stage_record.prepare_directory(stage.directory, key)
  if reason and job.is_reusable:
    stage.log(f'runs again: {reason} (what was there is in {stage.directory}.old)')
  return None


def _short(value: Any) -> str:
  return f'{value:.3f}' if isinstance(value, float) else f'{value:,}'


def _sections(stage: Stage, job: Job) -> dict[str, Any]:
  """The settings that the job reads; paths in the working directory as seen from there."""
  values = dataclasses.asdict(stage.settings)
  return _seen_from(stage.directory.parent, {name: values[name] for name in job.sections})


def _seen_from(workdir: Path, value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _seen_from(workdir, item) for name, item in value.items()}
  return value.removeprefix(f'{workdir}/') if isinstance(value, str) else value


def _inputs(stage: Stage, job: Job) -> dict[str, str]:
  """Content of the local files and directories that the stage reads."""
  found = {}
  for key in (*job.needs, *job.optional):
    found |= inputs.named_paths(key, operator.attrgetter(key)(stage.settings))
  if 'data' in job.sections and '{' not in stage.settings.data.chat_template:
    found['data.chat_template'] = stage.settings.data.chat_template
  # The normalizer job writes segment_reward.json into its own input.
  skip = SEGMENT_REWARD if stage.name == 'normalizer' else ''
  return {
    key: stage_record.content_hash(Path(path).expanduser(), skip)
    for key, path in found.items()
    if path and Path(path).expanduser().exists()
  }


def _outputs(stage: Stage, job: Job) -> dict[str, str]:
  found = {name: stage.directory / name for name in job.outputs}
  skip = SEGMENT_REWARD
  if stage.name == 'normalizer':
    found = {SEGMENT_REWARD: Path(stage.settings.reward_model.path).expanduser() / SEGMENT_REWARD}
    skip = ''
  return {
    name: stage_record.content_hash(path, skip) for name, path in found.items() if path.exists()
  }
