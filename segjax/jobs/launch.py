"""Carries out a run in its directory or bucket, for the command line and for `segjax.train`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from segjax import processes, storage
from segjax.config.load import Config, load_settings
from segjax.config.settings import Settings
from segjax.hf.upload import Repository
from segjax.jobs import pipeline, push
from segjax.jobs.job import Results
from segjax.model.mesh import make_mesh
from segjax.report.console import log
from segjax.run import bucket_mirror, inputs, preemption
from segjax.run.stage import Command

LOCAL_COPY = str(Path.home() / '.cache' / 'segjax' / 'runs')  # of runs on buckets


def train(
  config: Config,
  workdir: str | Path,
  overrides: Mapping[str, Any] | None = None,
  *,
  mesh: Mesh | None = None,
  push_to: str = '',
) -> dict[str, Results]:
  """Runs the stages of a config, any job, and returns their results by name.

    segjax.train('ppo:demo', 'runs/demo', {'ppo.max_steps': 20})['ppo']['reward']

  Finished stages are reused and interrupted ones resume, as on the command line. Interrupting the
  kernel saves a checkpoint and raises PreemptedError.

  Args:
    config: JOB[:PRESET] such as 'ppo:demo', a config file with its preset, a ConfigDict, or a dict
      of settings that replace defaults, with 'stages' among them.
    workdir: directory or bucket of the run.
    overrides: settings by dotted key, as after --config. on the command line. A reward function of
      a notebook is named '__main__:function'.
    mesh: devices; None lays all of them out by config.mesh.
    push_to: OWNER/NAME on the Hugging Face hub, to which the last model is uploaded at the end, as
      a private repository if it is new; see `segjax help hub`.

  Raises:
    UserError: a setting or an input is wrong; the message names it.
  """
  repository = Repository(push_to) if push_to else None
  settings, name = load_settings(config, overrides or {})
  mesh = mesh or make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
  log(f'segjax {name or ", ".join(settings.stages)} -> {workdir}')
  command = Command(name, f'segjax.train({name!r}, {str(workdir)!r})')
  with preemption.as_guest():
    started = time.monotonic()
    return run(settings, str(workdir), mesh, command, started=started, repository=repository)


def run(
  settings: Settings,
  workdir: str,
  mesh: Mesh,
  command: Command,
  *,
  started: float,
  local_copy: str = LOCAL_COPY,
  repository: Repository | None = None,
) -> dict[str, Results]:
  """Runs the stages in a directory or bucket, whose lock it holds; returns results by stage.

  Jobs that write no files, such as chat, need no directory.

  Args:
    started: time.monotonic() at the start.
    local_copy: directory for the local copy of a bucket.
    repository: where the last model is uploaded at the end; None for nowhere.
  """
  if not pipeline.writes_files(settings):
    stages = pipeline.prepare(settings, Path(workdir), mesh, command=command)
    pipeline.check_complete(stages)
    if repository:
      push.check(repository, stages)
    return pipeline.run(stages, Path(workdir), started, command.config)
  directory, mirror = _open_workdir(workdir, settings, local_copy)
  stages = pipeline.prepare(settings, directory, mesh, mirror, command)
  pipeline.check_complete(stages)
  if repository:
    push.check(repository, stages)
  storage.make_directory(directory)
  if '://' not in workdir:
    processes.check_shared_filesystem(directory)
  with mirror.hold_lock(directory):
    try:
      results = pipeline.run(stages, directory, started, command.config)
    except preemption.PreemptedError:
      mirror.try_push()  # the report of the interrupted run
      raise
    except Exception:  # perhaps in this process alone, so the others are not waited for
      mirror.push_last()
      raise
    mirror.push_and_wait()
    processes.barrier('end')
    if repository:
      push.run(repository, stages)
  return results


def _open_workdir(workdir: str, settings: Settings, local_copy: str) -> tuple[Path, Any]:
  """Returns (the local directory to work in, the mirror that copies it to the bucket)."""
  if '://' not in workdir:
    return inputs.expand_path('--workdir', workdir), bucket_mirror.NoMirror()
  local = bucket_mirror.local_directory(workdir, local_copy, processes.process_index())
  return local, bucket_mirror.BucketMirror(workdir, local, settings.checkpoint.max_failures, log)
