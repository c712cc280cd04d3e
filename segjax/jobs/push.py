"""--push_to: which model of a run is uploaded to the hub, and when.

What is uploaded, and how, is `hf.upload`.
"""

from segjax import processes
from segjax.errors import UserError
from segjax.hf import upload
from segjax.hf.upload import Repository
from segjax.jobs.registry import JOBS
from segjax.model.llama import num_parameters
from segjax.report.console import log
from segjax.run.network_sizes import find_network_config
from segjax.run.stage import Stage

_MODEL = 'model'  # output of the jobs that train


def check(repository: Repository, stages: list[Stage]) -> None:
  """Checks, before the run, that it makes a model and that the hub would take it.

  Raises:
    UserError: no stage writes a model, or the token is missing, invalid or may not write there.
  """
  find_model_stage(repository, stages)
  processes.in_first(repository.check_access)


def find_model_stage(repository: Repository, stages: list[Stage]) -> Stage:
  """Returns the stage whose model is uploaded: the last one that writes a model.

  Raises:
    UserError: none does.
  """
  for stage in reversed(stages):
    if _MODEL in JOBS[stage.name].outputs:
      return stage
  names = ', '.join(name for name, job in JOBS.items() if _MODEL in job.outputs)
  raise UserError(
    f'--push_to={repository.name} needs a stage that writes a model, one of {names}; config.stages='
    f'{",".join(stage.name for stage in stages)} has none. For the model of a finished run: '
    f'`segjax convert push RUN/STAGE/model {repository.name}`.'
  )


def run(repository: Repository, stages: list[Stage]) -> None:
  """Uploads the model; in the first process, for which the others wait.

  Raises:
    UserError: the upload failed; the line holds the command that tries again.
  """
  model = find_model_stage(repository, stages).model_directory
  processes.in_first(lambda: upload.push(repository, model, log))


def describe(repository: Repository, stages: list[Stage]) -> None:
  """Prints what would be uploaded: the files of a model that exists, else its size."""
  stage = find_model_stage(repository, stages)
  model = stage.model_directory
  log(f'--push_to: {model} would be uploaded to {repository}')
  if model.is_dir():
    files = upload.find_files(model)
    for line in (*upload.describe(files), *upload.find_warnings(files)):
      log(line)
  elif network := find_network_config(stage.settings):
    log(f'  {num_parameters(network):,} parameters, README.md, {", ".join(upload.RUN_FILES)}')
