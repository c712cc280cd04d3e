"""Runs the jobs of config.stages in turn, each on the output of the previous ones."""

import dataclasses
import functools
import operator
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from segjax import processes
from segjax.config.lora import with_adapter_rates
from segjax.config.settings import Settings, replace
from segjax.errors import UserError, first_line
from segjax.jobs import input_check, run_end, stage_key
from segjax.jobs.batch_sizes import check_batches, keys_to_lower
from segjax.jobs.job import Input, Job, Results, function_paths
from segjax.jobs.registry import JOBS, check_stages
from segjax.jobs.run_estimate import RunEstimate
from segjax.report import profiling, stage_history, wandb_run
from segjax.report.console import format_duration, log
from segjax.report.html_report import REPORT_FILE, NoPage, Page
from segjax.report.result_warnings import result_warnings
from segjax.run import inputs, stage_record
from segjax.run.bucket_mirror import NoMirror
from segjax.run.stage import Command, Stage
from segjax.run.template_date import with_template_date
from segjax.run.training_loop import checkpoint_dir
from segjax.train.user_functions import load_function


def run(
  stages: list[Stage], workdir: Path, started: float, config_name: str = ''
) -> dict[str, Results]:
  """Runs the stages of `prepare` and prints their tables; returns their results by name.

  Args:
    stages: the stages, prepared.
    workdir: directory of the run.
    started: time.monotonic() at the start of the process.
    config_name: title of report.html.
  """
  results, estimate, has_report = {}, RunEstimate(stages), False
  written = [stage.name for stage in stages if JOBS[stage.name].has_files]
  input_check.check(stages)  # before the first one starts, which may take hours
  with Page(workdir, config_name, written) if written else NoPage() as page:
    for number, stage in enumerate(stages, 1):
      name, left = stage.name, estimate.begin(stage.name)
      log('')
      if len(stages) > 1:
        log(
          f'stage {number} of {len(stages)}: {name}'
          + (f', about {format_duration(left)} left' if left else '')
        )
      stage = dataclasses.replace(
        stage,
        refresh=page.refresh,
        seconds_after=functools.partial(estimate.seconds_after, name),
      )
      page.begin(name)
      with jax.set_mesh(stage.mesh):
        results[name] = run_stage(stage)
      estimate.record(name, results[name]['seconds'])
      has_report = page.write()
  if not processes.is_first():
    return results
  for name in results:
    if print_table := JOBS[name].print_table:
      log('')
      print_table(results[name])
  for stage in stages:
    if after_run := JOBS[stage.name].after_run:
      after_run(stage, results, started)
  headlines = [
    headline(stage, results[stage.name])
    for stage in stages
    if (headline := JOBS[stage.name].headline)
  ]
  report = workdir / REPORT_FILE if has_report else None
  run_end.log_end(headlines, time.monotonic() - started, report)
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
  wandb_run.check_login(settings.wandb_project)
  profiling.parse(settings.profile_steps)
  inputs.check_creatable('config.checkpoint.directory', settings.checkpoint.directory)
  stages = []
  command = dataclasses.replace(command or Command(), settings=dataclasses.asdict(settings))
  for name in settings.stages:
    job = JOBS[name]
    stage = Stage(
      name,
      connect_stage(job, settings, workdir),
      workdir / name,
      mesh,
      mirror or NoMirror(),
      command=command,
    )
    check_batches(job, settings, mesh)
    own = inputs.with_stage_data(settings, name)
    for item in job.inputs:
      for key, path in item.paths(_get(own, item.key)).items():
        is_own = item.key == 'data.path' and own.data.path != settings.data.path
        if path not in item.keywords:
          inputs.check_path(f'{name}.{key}' if is_own else key, path, stage.directory)
    stages.append(stage)
  for name in settings.stages:
    for key, path in function_paths(JOBS[name], settings).items():
      load_function(path, key)
  return stages


def check_complete(stages: list[Stage]) -> None:
  """Checks that every path that a stage needs is set, and creates config.checkpoint.directory.

  Raises:
    UserError: names the key.
  """
  for stage in stages:
    if missing := missing_keys(stage):
      raise UserError(
        f'config.{missing[0]} is empty, and the {stage.name} job needs it; give a path or a hub id '
        f'by --config.{missing[0]}=...'
      )
    inputs.check_writable(stage.settings.checkpoint.directory)


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
  settings = inputs.with_stage_data(settings, job.name)
  earlier = _earlier_stages(job.name, settings)
  values = {}
  for item in (item for item in job.inputs if item.is_read(settings)):
    for source in _active_sources(item, earlier):
      value = _source_value(source, settings, workdir, earlier)
      if value:
        values[item.key] = value
        break
  return with_adapter_rates(replace(settings, **values))


def _earlier_stages(name: str, settings: Settings) -> tuple[str, ...]:
  return settings.stages[: settings.stages.index(name)]


def _active_sources(item: Input, earlier: tuple[str, ...]) -> tuple[str, ...]:
  if item.only_after and not set(item.only_after) & set(earlier):
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
  job, key, started = JOBS[stage.name], {}, time.monotonic()
  if not job.has_files:
    return _run_job(stage, job, _load(stage, job), started)
  results = None
  stage = with_template_date(stage)
  if processes.is_first():
    key = stage_key.make_key(stage, job)
    results = _find_results(stage, job, key)
  results = processes.broadcast_from_first(results)
  if results is not None:
    stage.mirror.push_and_wait(stage.directory)  # an earlier directory may have been restored
    return results
  loaded = _load(stage, job)  # a wrong input leaves the earlier output where it is
  if processes.is_first():
    _prepare_directory(stage, key)
    _record_start(stage)
  stage.mirror.push_and_wait(stage.directory)
  processes.barrier(f'{stage.name} directory')
  results = _run_job(stage, job, loaded, started)
  if processes.is_first():
    results = stage_record.record_results(
      stage.directory, key, results, stage_key.hash_outputs(stage, job)
    )
  stage.mirror.push_and_wait()
  if processes.is_first():
    _drop_states(stage)
  return processes.broadcast_from_first(results)


def _load(stage: Stage, job: Job) -> tuple[Any, ...]:
  """Returns the arguments of `job.run` after the stage."""
  return (job.load(stage),) if job.load else ()


def _run_job(stage: Stage, job: Job, loaded: tuple[Any, ...], started: float) -> Results:
  """Runs the job and prints a line at its end."""
  try:
    results = job.run(stage, *loaded)
  except jax.errors.JaxRuntimeError as error:
    if not re.search('RESOURCE_EXHAUSTED|[Oo]ut of memory', str(error)):
      raise
    raise UserError(
      f'{stage.name} ran out of memory ({first_line(error)}); lower '
      f'{keys_to_lower(job, stage.settings)}, or see `segjax help memory`.'
    ) from error
  results['seconds'] = time.monotonic() - started
  processes.barrier(f'{stage.name} done')
  if processes.is_first():
    summary = ''.join(f', {_label(k)} {_short(results[k])}' for k in job.summary)
    stage.log(f'done in {results["seconds"]:.1f} s{summary}')
    for warning in result_warnings(stage.name, results):
      stage.log(f'warning: {warning}')
  return results


def writes_files(settings: Settings) -> bool:
  """Returns whether a stage of the run writes files: chat and selfcheck alone write none."""
  return any(JOBS[name].has_files for name in settings.stages)


def _record_start(stage: Stage) -> None:
  """Records in config.json which command the stage's results are of."""
  c = stage.command
  stage_history.record_start(stage.directory.parent, stage.name, c.line, c.config, c.settings)


def _drop_states(stage: Stage) -> None:
  """Removes the training states of a stage, once stage.json says that it is finished."""
  if checkpoint_dir(stage).exists():
    checkpoint_dir(stage).rmtree()


def _find_results(stage: Stage, job: Job, key: stage_record.Key) -> Results | None:
  """Returns results that can be reused, None if there are none."""
  if stage_record.restore_old(stage.directory, key):
    _record_start(stage)  # config.json had the config of the results that were there
  outputs = stage_key.hash_outputs(stage, job)
  results = stage_record.load_results_if_valid(stage.directory, key, outputs)
  if results is None:
    return None
  stage.log(f'reused from {stage.directory}: settings, inputs and code are the same')
  _drop_states(stage)  # a run that was killed at the stage's end has left them
  return results


def _prepare_directory(stage: Stage, key: stage_record.Key) -> None:
  """Makes the stage's directory ready, and says why an earlier one is moved away."""
  if reason := stage_record.prepare_directory(stage.directory, key):
    stage.log(f'runs again: {reason} (the earlier output is in {stage.directory}.old)')


def _label(name: str) -> str:
  return 'KL' if name == 'kl' else name.replace('_', ' ')


def _short(value: Any) -> str:
  return f'{value:.3f}' if isinstance(value, float) else f'{value:,}'


def _get(settings: Settings, key: str) -> Any:
  return operator.attrgetter(key)(settings)
