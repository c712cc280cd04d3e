"""A checkpoint from the Hugging Face hub, refused before a byte of it is fetched where it must be.

What makes a checkpoint readable is the caller's business. jax is not imported.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segjax.errors import UserError, first_line

_ADDRESS = 'https://huggingface.co'


def download(
  name: str, patterns: Sequence[str], check: Callable[[list[str], dict[str, Any]], None]
) -> Path:
  """The local copy of a hub repository, in huggingface_hub's cache; no code of it is ever run.

  The cache's locks let the processes of one host fetch every file once.

  Args:
    name: 'owner/name'.
    patterns: of the files that are wanted.
    check: called with all file names and what the hub knows of config.json before any download.

  Raises:
    ValueError: for an unknown or gated repository, or where the hub cannot be reached and the
      cache does not have it; and those of `check`.
  """
  import huggingface_hub
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    api.auth_check(name)
    info = api.model_info(name)
  except errors.GatedRepoError as error:
    raise UserError(
      f'{name} is gated: accept its licence at {_ADDRESS}/{name}, then log in with the '
      'account that did: `hf auth login`.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(
      f'{name} is neither a local directory nor a model that the Hugging Face hub shows us; check '
      'the name, and `hf auth login` if the model is private.'
    ) from error
  except Exception as error:  # no network, hub down: the class depends on the http library
    return _cached(name, patterns, error)
  check([file.rfilename for file in info.siblings or []], info.config or {})
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=list(patterns), ignore_patterns=['original/*']
      )
    )
  except Exception as error:
    raise UserError(
      f'{name} could not be downloaded ({type(error).__name__}: {first_line(error)}); run it '
      'again, and what is here already is kept.'
    ) from error


def _cached(name: str, patterns: Sequence[str], error: Exception) -> Path:
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        name, local_files_only=True, allow_patterns=list(patterns), ignore_patterns=['original/*']
      )
    )
  except Exception:
    raise UserError(
      f'{name} is neither a local directory nor in the cache, and the Hugging Face hub did not '
      f'answer ({type(error).__name__}: {first_line(error)}). Check the name and the network.'
    ) from error
