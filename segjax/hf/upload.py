"""Uploads a finished model with its card and its run's report to the Hugging Face hub.

Nothing is uploaded that was not asked for by name. jax is not imported.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segjax import json_files
from segjax.errors import UserError, first_line
from segjax.hf import adapter_config

# Of the run that holds the model: name in the repository, and where it may lie in the run.
RUN_FILES = {
  'report.html': ('report.html',),
  'results.json': ('results.json', 'evaluate/results.json'),
}
_STAGE_FILE = 'stage.json'  # which the directory of a run's stage has, beside `model`
_WEIGHTS = ('.safetensors', '.safetensors.index.json')


@dataclasses.dataclass(frozen=True)
class Repository:
  """A model repository on the hub that is written to.

  Attributes:
    name: OWNER/NAME.
    public: whether it is made public where it does not exist; an existing one stays what it is.
  """

  name: str
  public: bool = False

  def __post_init__(self):
    """Raises UserError unless the name is OWNER/NAME in characters that the hub allows."""
    from huggingface_hub import utils

    try:
      utils.validate_repo_id(self.name)
      is_valid = self.name.count('/') == 1
    except utils.HFValidationError:
      is_valid = False
    if not is_valid:
      raise UserError(
        f'{self.name!r} is not a name on the Hugging Face hub; give OWNER/NAME of letters, digits, '
        "'-', '_' and '.', as in --push_to=me/my-model."
      )

  @property
  def address(self) -> str:
    """The address of the repository's page."""
    return f'{_endpoint()}/{self.name}'

  def __str__(self) -> str:
    kind = 'public' if self.public else 'private'
    return f'{self.address} ({kind} if it is new)'

  def check_access(self) -> None:
    """Checks that there is a token, and that it may write to repositories of the owner.

    Raises:
      UserError: there is no token, it is invalid or read-only, or the owner is somebody else.
    """
    account = self._account()
    token = _get(_get(account, 'auth'), 'accessToken')
    if _get(token, 'role') == 'read':
      raise UserError(
        f'the token for {self.name} may only read; make one that may write at '
        f'{_endpoint()}/settings/tokens, then run `hf auth login`.'
      )
    organizations = [_get(item, 'name') for item in account.get('orgs') or []]
    owners = [str(name) for name in (account.get('name'), *organizations) if name]
    if self.name.partition('/')[0].lower() not in [owner.lower() for owner in owners]:
      raise UserError(
        f'{self.name}: the token belongs to {", ".join(owners)}; give --push_to={owners[0]}/NAME '
        'or log in as the owner: `hf auth login`.'
      )

  def _account(self) -> dict[str, Any]:
    """Returns what the hub says of the token: name, organizations, role."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
      return huggingface_hub.HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
      raise UserError(
        f'{self.name}: there is no token for the Hugging Face hub; run `hf auth login` or set '
        'HF_TOKEN.'
      ) from error
    except Exception as error:  # no network, hub down: the class depends on the http library
      if getattr(getattr(error, 'response', None), 'status_code', None) == 401:
        raise UserError(
          f'{self.name}: the hub refuses the token; run `hf auth login` or correct HF_TOKEN.'
        ) from error
      raise UserError(
        f'{self.name}: the Hugging Face hub did not answer ({_reason(error)}); check the network, '
        'or run without --push_to and upload later: `segjax convert push`.'
      ) from error

  def commit(self, files: dict[str, Path], message: str) -> None:
    """Uploads files in one commit: a failure leaves the repository as it was.

    The repository is made if it does not exist. Weights of another name that it has, such as the
    shards of an earlier model, are removed in the same commit.

    Args:
      files: local files by their path in the repository; see `find_files`.
      message: subject of the commit.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, utils

    if not sys.stderr.isatty():  # in a log file each refresh of a bar would be a line
      utils.disable_progress_bars()
    api = huggingface_hub.HfApi()
    api.create_repo(self.name, private=not self.public, exist_ok=True)
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    for name in api.list_repo_files(self.name):
      if name.endswith(_WEIGHTS) and name not in files:
        operations.append(CommitOperationDelete(name))
    api.create_commit(self.name, operations, commit_message=message)


def push(repository: Repository, model: Path, log: Callable[[str], None]) -> None:
  """Uploads a model, its card and its run's report; says where they are.

  Args:
    repository: what to write to.
    model: see `find_files`.
    log: receives lines for the user.

  Raises:
    UserError: the upload failed; the line holds the command that tries again.
  """
  files = find_files(model)
  for warning in find_warnings(files):
    log(warning)
  try:
    repository.commit(files, f'Upload {model.parent.name}/{model.name} by segjax')
  except Exception as error:  # the class depends on the http library
    flags = ' --public' if repository.public else ''
    raise UserError(
      f'{repository.name} could not be written ({_reason(error)}); {model} is complete, try again: '
      f'`segjax convert push {shlex.quote(str(model))} {repository.name}{flags}`.'
    ) from error
  log(f'uploaded {model} to {repository.address}: {len(files)} files, {_size(_total(files))}')


def from_flags(name: str, public: bool) -> Repository | None:
  """Returns the repository of --push_to and --push_public; None without --push_to.

  Raises:
    UserError: the name is not OWNER/NAME, or --push_public is set alone.
  """
  if public and not name:
    raise UserError('--push_public needs --push_to=OWNER/NAME, the repository to make public.')
  return Repository(name, public) if name else None


def find_files(model: Path) -> dict[str, Path]:
  """Returns what is uploaded of a model: local files by their path in the repository.

  These are all files of its directory and, where a run wrote it, the run's report.html and
  results.json. Training states lie elsewhere and are left out.

  Args:
    model: an HF directory, such as RUN/ppo/model, or an adapter.

  Raises:
    UserError: the directory does not exist or holds no model.
  """
  if not model.is_dir():
    raise UserError(f'{model} is not a directory; give that of a model, such as RUN/ppo/model.')
  files = {
    path.relative_to(model).as_posix(): path
    for path in sorted(model.rglob('*'))
    if path.is_file() and not any(_is_hidden(part) for part in path.relative_to(model).parts)
  }
  if not any(name.endswith('.safetensors') for name in files):
    raise UserError(
      f'{model} has no safetensors to upload; give the directory of a model, such as '
      'RUN/ppo/model, or export a segjax checkpoint first: `segjax convert export`.'
    )
  if (model.parent / _STAGE_FILE).is_file():
    run = model.parent.parent
    for name, places in RUN_FILES.items():
      found = next((run / place for place in places if (run / place).is_file()), None)
      if found and name not in files:
        files[name] = found
  return files


def describe(files: dict[str, Path]) -> list[str]:
  """Returns a line with size and name for each file, and one with their sum."""
  lines = [f'  {_size(path.stat().st_size):>9}  {name}' for name, path in files.items()]
  return [*lines, f'  {_size(_total(files)):>9}  in {len(files)} files']


def find_warnings(files: dict[str, Path]) -> list[str]:
  """Returns lines on what readers of the repository would lack."""
  adapter = files.get(adapter_config.CONFIG)
  base = adapter and json_files.read_object(adapter).get('base_model_name_or_path')
  if isinstance(base, str) and Path(base).is_absolute():
    return [
      f'warning: {adapter_config.CONFIG} names its base by a local path, {base}; others cannot '
      'load it. Write a hub id there, or upload what `segjax convert merge` makes of it.'
    ]
  return []


def _is_hidden(name: str) -> bool:
  return name.startswith('.') or '.partial' in name


def _total(files: dict[str, Path]) -> int:
  return sum(path.stat().st_size for path in files.values())


def _size(size: int) -> str:
  for unit, scale in (('GB', 10**9), ('MB', 10**6), ('kB', 10**3)):
    if size >= scale:
      return f'{size / scale:.1f} {unit}'
  return f'{size} B'


def _get(value: Any, key: str) -> Any:
  return value.get(key) if isinstance(value, dict) else None


def _endpoint() -> str:
  from huggingface_hub import constants

  return constants.ENDPOINT.rstrip('/')


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {first_line(error)}'
