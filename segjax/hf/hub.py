"""Downloads checkpoints from the Hugging Face hub, after a check of what they hold.

The caller decides which checkpoints are readable. jax is not imported.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segjax.errors import UserError, first_line

_ADDRESS = 'https://huggingface.co'


def download(
  name: str, patterns: Sequence[str], check: Callable[[list[str], dict[str, Any]], None]
) -> Path:
  """Returns the local copy of a hub repository in huggingface_hub's cache, downloaded if needed.

  No code of the repository is ever run. The cache's locks let the processes of one host fetch
  every file once. If the hub cannot be reached, the cached copy is used unchecked.

  Args:
    name: hub id 'owner/name'.
    patterns: names of the files to download, with wildcards.
    check: called with all file names and the hub's excerpt of config.json before any download.

  Raises:
    ValueError: the repository is unknown or gated, the hub cannot be reached and the cache does
      not hold it, or `check` raised.
  """
  import huggingface_hub
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    api.auth_check(name)
    listing = api.model_info(name)
  except errors.GatedRepoError as error:
    raise UserError(
      f'{name} is gated: accept its licence at {_ADDRESS}/{name}, then log in with that account: '
      '`hf auth login`.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(
      f'{name} is neither a local directory nor a model that the Hugging Face hub shows us; check '
      'the name, and run `hf auth login` if the model is private.'
    ) from error
  except Exception as error:  # no network, hub down: the class depends on the http library
    unreachable = error
  else:
    unreachable = None
    check([file.rfilename for file in listing.siblings or []], listing.config or {})
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name,
        allow_patterns=list(patterns),
        ignore_patterns=['original/*'],
        local_files_only=unreachable is not None,
      )
    )
  except Exception as error:
    if unreachable is not None:
      raise UserError(
        f'{name} is neither a local directory nor in the cache, and the Hugging Face hub did not '
        f'answer ({_reason(unreachable)}); check the name and the network.'
      ) from unreachable
    raise UserError(
      f'{name} could not be downloaded ({_reason(error)}); run it again: files that are complete '
      'are not fetched again.'
    ) from error


def id_of(directory: Path) -> str:
  """Returns the hub id of a directory of huggingface_hub's cache, '' for another directory."""
  match = re.search(r'/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$', directory.as_posix())
  return f'{match[1]}/{match[2]}' if match else ''


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {first_line(error)}'
