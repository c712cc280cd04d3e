"""Runs the jobs of config.stages in turn, each on the output of the previous ones."""

import dataclasses
import importlib.util
import operator
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from segjax import processes
from segjax.config.settings import Settings, replace
from segjax.errors import UserError
from segjax.jobs.job import Input, Job, Results
from segjax.jobs.registry import JOBS, check_stages
from segjax.model.mesh import check_batch
from segjax.report import profiling
from segjax.report.console import log
from segjax.report.html_report import Page
from segjax.report.result_warnings import result_warnings
from segjax.run import inputs, stage_record
from segjax.run.bucket_mirror import NoMirror
from segjax.run.stage import Command, Stage
from segjax.run.training_loop import checkpoint_dir


def run(
  stages: list[Stage], workdir: Path, started: float, config_name: str = ''
) -> dict[str, Results]:
  """Runs the stages of `prepare` and prints their tables; returns their results by name.

  Args:
    stages: the stages, prepared.
    workdir: directory of the run.
    started: time.time() at the start of the process.
    config_name: title of report.html.
  """
  results = {}
  with Page(workdir, config_name, [stage.name for stage in stages]) as page:
    for stage in stages:
      with jax.set_mesh(stage.mesh):
        results[stage.name] = run_stage(dataclasses.replace(stage, refresh=page.refresh))
      page.write()
  if not processes.is_first():
    return results
  for name in results:
    if print_table := JOBS[name].print_table:
      log('')
      print_table(results[name])
  for stage in stages:
    if after_run := JOBS[stage.name].after_run:
      after_run(stage, results, started)
  return results


def prepare(
  settings: Settings,
  workdir: Path,
  mesh: Mesh,
  mirror: NoMirror | None = None,
  command: Command | None = None,
) -> list[Stage]:
  """Returns the stages with their paths, after all quick checks.

  Raises:
    UserError: a stage does not exist, a batch does not divide over the mesh, a path or function
      does not exist, ...
  """
  check_stages(settings.stages)
  if settings.wandb_project and importlib.util.find_spec('wandb') is None:
    raise UserError(
      f'config.wandb_project={settings.wandb_project!r} needs the package wandb; run '
      "pip install -e '.[wandb]'."
    )
  profiling.parse(settings.profile_steps)
  inputs.check_writable(settings.checkpoint.directory)
  stages = []
  for name in settings.stages:
    job = JOBS[name]
    stage = Stage(
      name,
      connect_stage(job, settings, workdir),
      workdir / name,
      mesh,
      mirror or NoMirror(),
      command=command or Command(),
    )
    check_batches(job, settings, mesh)
    for item in job.inputs:
      for key, path in item.paths(_get(settings, item.key)).items():
        if path not in item.keywords:
          inputs.check_path(key, path, stage.directory)
    stages.append(stage)
  for name in settings.stages:
    if check := JOBS[name].check:
      check(settings)
  return stages


def check_batches(job: Job, settings: Settings, mesh: Mesh) -> None:
  """Checks that the batches of the job divide over the mesh; UserError names the key."""
  for key in job.batch_keys:
    if size := _get(settings, key):
      check_batch(f'config.{key}={size}', size, mesh)


def check_complete(stages: list[Stage]) -> None:
  """Checks that every path that a stage needs is set; UserError names the key."""
  for stage in stages:
    if missing := missing_keys(stage):
      raise UserError(
        f'config.{missing[0]} is empty, and the {stage.name} job needs it; give a path or a hub id '
        f'by --config.{missing[0]}=...'
      )


def missing_keys(stage: Stage) -> list[str]:
  """Returns the keys of required inputs that neither the user nor an earlier stage provides."""
  missing = []
  for item in JOBS[stage.name].inputs:
    if _get(stage.settings, item.key) or not item.is_required(stage.settings):
      continue
    # The default of one key may be another, missing key: then setting that one is enough.
    sources = _active_sources(item, _earlier_stages(stage.name, stage.settings))
    if not any(f'config.{key}' in sources for key in missing):
      missing.append(item.key)
  return missing


def connect_stage(job: Job, settings: Settings, workdir: Path) -> Settings:
  """Returns the settings of a stage, with the paths of what earlier stages write."""
  earlier = _earlier_stages(job.name, settings)
  values = {}
  for item in job.inputs:
    for source in _active_sources(item, earlier):
      value = _source_value(source, settings, workdir, earlier)
      if value:
        values[item.key] = value
        break
  return replace(settings, **values)


def _earlier_stages(name: str, settings: Settings) -> tuple[str, ...]:
  return settings.stages[: settings.stages.index(name)]


def _active_sources(item: Input, earlier: tuple[str, ...]) -> tuple[str, ...]:
  if item.only_after and item.only_after not in earlier:
    return (f'config.{item.key}',)
  return item.sources


def _source_value(source: str, settings: Settings, workdir: Path, earlier: tuple[str, ...]) -> str:
  """Returns the value of a source of an `Input`, '' if it does not exist."""
  if source.startswith('config.'):
    return _get(settings, source.removeprefix('config.'))
  job = source.partition('/')[0]
  return str(workdir / source) if job in earlier else ''


def run_stage(stage: Stage) -> Results:
  """Runs one stage, or reuses the results of a run with the same settings and inputs."""
  job, key = JOBS[stage.name], {}
  results = None
  if processes.is_first():
    key = {'settings': _settings_key(stage, job), 'inputs': _hash_inputs(stage, job)}
    results = _prepare_directory(stage, job, key)
  stage.mirror.push_and_wait(stage.directory)
  results = processes.broadcast_from_first(results)
  if results is not None:
    return results
  start_time = time.monotonic()
  results = job.run(stage)
  results['seconds'] = time.monotonic() - start_time
  processes.barrier(f'{stage.name} done')
  if processes.is_first():
    summary = ''.join(f', {k.replace("_", " ")} {_short(results[k])}' for k in job.summary)
    stage.log(f'done in {results["seconds"]:.1f} s{summary}')
    for warning in result_warnings(stage.name, results):
      stage.log(f'warning: {warning}')
    results = stage_record.record_results(stage.directory, key, results, _hash_outputs(stage, job))
  stage.mirror.push_and_wait()
  if processes.is_first():
    _drop_states(stage)
  return processes.broadcast_from_first(results)


def _drop_states(stage: Stage) -> None:
  """Removes the training states of a stage, once stage.json says that it is finished."""
  if checkpoint_dir(stage).exists():
    checkpoint_dir(stage).rmtree()


def _prepare_directory(stage: Stage, job: Job, key: stage_record.Key) -> Results | None:
  """Returns results that can be reused; without any, makes the stage's directory ready."""
  stage_record.restore_old(stage.directory, key)
  results = stage_record.load_results_if_valid(stage.directory, key, _hash_outputs(stage, job))
  if results is not None and job.is_reusable:
    stage.log(f'reused from {stage.directory}: settings and inputs are the same')
    _drop_states(stage)  # a run that was killed at the stage's end has left them
    return results
  log('')
  reason = stage_record.prepare_directory(stage.directory, key)
  if reason and job.is_reusable:
    stage.log(f'runs again: {reason} (the earlier output is in {stage.directory}.old)')
  return None


def _short(value: Any) -> str:
  return f'{value:.3f}' if isinstance(value, float) else f'{value:,}'


def _get(settings: Settings, key: str) -> Any:
  return operator.attrgetter(key)(settings)


def _settings_key(stage: Stage, job: Job) -> dict[str, Any]:
  """Returns the settings that the job reads, with paths relative to the working directory.

  A run that was moved to another directory therefore still reuses its stages.
  """
  values = dataclasses.asdict(stage.settings)
  return _relative_to(stage.directory.parent, {name: values[name] for name in job.sections})


def _relative_to(workdir: Path, value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _relative_to(workdir, item) for name, item in value.items()}
  return value.removeprefix(f'{workdir}/') if isinstance(value, str) else value


def _hash_inputs(stage: Stage, job: Job) -> dict[str, str]:
  """Returns content hashes of the local files and directories that the stage reads, by key."""
  paths = {}
  for item in job.inputs:
    paths |= item.paths(_get(stage.settings, item.key))
  if 'data' in job.sections and '{' not in stage.settings.data.chat_template:
    paths['data.chat_template'] = stage.settings.data.chat_template
  # A file that the job itself writes into an input must not count as a change of that input.
  skip = job.rewrites[1:] if job.rewrites else ()
  return {
    key: stage_record.content_hash(Path(path).expanduser(), skip)
    for key, path in paths.items()
    if path and Path(path).expanduser().exists()
  }


def _hash_outputs(stage: Stage, job: Job) -> dict[str, str]:
  """Returns content hashes of what the stage has written."""
  paths = {name: stage.directory / name for name in job.outputs}
  skip = [other.rewrites[1] for other in JOBS.values() if other.rewrites and other is not job]
  if job.rewrites:
    key, file = job.rewrites
    paths[file] = Path(_get(stage.settings, key)).expanduser() / file
  return {
    name: stage_record.content_hash(path, skip) for name, path in paths.items() if path.exists()
  }
