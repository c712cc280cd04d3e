"""The key of a stage: everything that its results depend on, for `run.stage_record`."""

import dataclasses
import operator
from pathlib import Path
from typing import Any

from segjax.config.settings import Settings, replace
from segjax.hf.adapter_config import base_directory, is_adapter, read_adapter
from segjax.jobs.job import Input, Job, function_paths
from segjax.jobs.registry import JOBS
from segjax.run import remote_inputs, source_code, stage_record
from segjax.run.stage import Stage


def make_key(stage: Stage, job: Job) -> stage_record.Key:
  """Returns what the results of a stage depend on.

  settings: the sections that the job reads.
  inputs: hashes of the files that it reads, commits of hub repositories.
  functions: the user's functions that it calls, with hashes of their source.
  versions: of segjax and the libraries.
  """
  return {
    'settings': _settings(stage, job),
    'inputs': _inputs(stage, job),
    'functions': {
      key: f'{path} {source_code.hash_function(path)}'.strip()
      for key, path in function_paths(job, stage.settings).items()
    },
    'versions': source_code.versions(),
  }


def hash_outputs(stage: Stage, job: Job) -> dict[str, str]:
  """Returns content hashes of what the stage has written."""
  paths = {name: stage.directory / name for name in job.outputs}
  skip = [other.rewrites[1] for other in JOBS.values() if other.rewrites and other is not job]
  if job.rewrites:
    key, file = job.rewrites
    paths[file] = Path(operator.attrgetter(key)(stage.settings)).expanduser() / file
  return {
    name: stage_record.content_hash(path, skip) for name, path in paths.items() if path.exists()
  }


def _settings(stage: Stage, job: Job) -> dict[str, Any]:
  """Returns the settings that the job reads, with paths relative to the working directory.

  A run that was moved to another directory therefore still reuses its stages.
  """
  defaults = {key: operator.attrgetter(key)(Settings()) for key in job.without_effect}
  values = dataclasses.asdict(replace(stage.settings, **defaults))
  return _relative_to(stage.directory.parent, {name: values[name] for name in job.sections})


def _relative_to(workdir: Path, value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _relative_to(workdir, item) for name, item in value.items()}
  if isinstance(value, tuple):  # of names, or of lines that may hold paths
    return tuple(line.replace(f'path={workdir}/', 'path=') for line in value)
  return value.removeprefix(f'{workdir}/') if isinstance(value, str) else value


def _inputs(stage: Stage, job: Job) -> dict[str, str]:
  """Returns what the stage's inputs hold, by key: hashes of local files, versions of others."""
  # A file that the job itself writes into an input must not count as a change of that input.
  skip = job.rewrites[1:] if job.rewrites else ()
  contents, bases = {}, {}
  for item in job.inputs:
    for key, path in item.paths(operator.attrgetter(item.key)(stage.settings)).items():
      if path and path not in item.keywords:
        contents[key] = _content(item, path, skip)
        if not item.is_rows and is_adapter(directory := Path(path).expanduser()):
          bases.setdefault(base_directory(read_adapter(directory)), f'base of {key}')
  # Adapters mostly share a base, which is large: it is read once.
  contents |= {key: stage_record.content_hash(base, skip) for base, key in bases.items()}
  if 'data' in job.sections and '{' not in stage.settings.data.chat_template:
    template = Path(stage.settings.data.chat_template).expanduser()
    contents['data.chat_template'] = (
      stage_record.content_hash(template) if template.is_file() else ''
    )
  return {key: content for key, content in contents.items() if content}


def _content(item: Input, path: str, skip: tuple[str, ...]) -> str:
  local = Path(path).expanduser()
  if local.exists():
    return stage_record.content_hash(local, skip)
  return remote_inputs.identify(path, item.is_rows)
