"""A stage's run at Weights & Biases: the login before anything is loaded, one run over restarts."""

import importlib.util
import os
import uuid
from pathlib import Path

from segjax import processes
from segjax.errors import UserError
from segjax.storage import write_text_atomically

ID_FILE = 'wandb_id.txt'  # in the stage's directory

_NEEDS_NO_KEY = ('offline', 'dryrun', 'disabled')  # values of WANDB_MODE


def check_login(project: str) -> None:
  """Checks that metrics can be sent, before a run has loaded anything; '' sends none.

  Where no key is stored, a terminal is asked for one.

  Raises:
    UserError: the package is missing, there is no key, or the server refuses it.
  """
  if not project:
    return
  if importlib.util.find_spec('wandb') is None:
    raise UserError(
      f"config.wandb_project={project!r} needs the package wandb; run pip install -e '.[wandb]'."
    )
  if not processes.is_first() or os.environ.get('WANDB_MODE') in _NEEDS_NO_KEY:
    return
  import wandb

  try:
    wandb.login()
  except wandb.Error as error:
    raise _refusal(project, error, 'run `wandb login`, or set WANDB_API_KEY') from None


class WandbRun:
  """The run of a stage, which a restarted stage continues.

  Its id is stored in the stage's directory. Steps that a restart repeats are not sent again: W&B
  accepts no step twice, and a resumed run computes the same metrics.
  """

  def __init__(self, project: str, directory: Path):
    import wandb

    id_file = directory / ID_FILE
    is_resumed = id_file.exists()
    if not is_resumed:
      write_text_atomically(id_file, f'{uuid.uuid4().hex[:8]}\n')
    try:
      self._run = wandb.init(
        project=project,
        name='/'.join(directory.absolute().parts[-2:]),  # the run's directory and the stage
        id=id_file.read_text(encoding='utf-8').strip(),
        resume='allow' if is_resumed else None,
        dir=str(directory),
      )
    except wandb.Error as error:
      raise _refusal(project, error, 'repeat the command once that is solved') from None

  def log(self, step: int, values: dict[str, float]) -> None:
    """Sends the metrics of a step, unless W&B has them."""
    if step >= self._run.step:
      self._run.log(values, step=step)

  def finish(self, failed: bool) -> None:
    """Waits until everything is sent and marks the run as finished or failed."""
    self._run.finish(exit_code=int(failed))


def _refusal(project: str, error: Exception, remedy: str) -> UserError:
  reason = str(error).strip().splitlines()[0].rstrip('.') if str(error).strip() else repr(error)
  return UserError(
    f'config.wandb_project={project!r}: {reason}; {remedy}, or keep the metrics on this disk by '
    'WANDB_MODE=offline.'
  )
