"""Paths that settings name, checked before anything starts."""

from pathlib import Path

from etils import epath

from segjax.data.sources import is_hub_id
from segjax.errors import UserError
from segjax.jobs import ppo

LISTS = ('evaluate_reward.pairs',)  # keys whose paths are joined by commas


def named(key: str, value: str) -> dict[str, str]:
  """The paths of a key, each under its own name: those of a list are numbered from 0."""
  if key not in LISTS:
    return {key: value}
  return {f'{key}[{number}]': path for number, path in enumerate(split(value))}


def split(value: str) -> list[str]:
  """The paths of a list."""
  return [path.strip() for path in value.split(',') if path.strip()]


def check(key: str, path: str, directory: Path) -> None:
  """ValueError unless the path is there, or on a bucket or hub, and outside of `directory`."""
  if not path or '://' in path or (key == 'critic.init' and path in ppo.CRITICS):
    return
  place = Path(path).expanduser()
  if not place.exists() and not is_hub_id(path):
    raise UserError(f'config.{key}={path!r}: no such file or directory, and no hub id.')
  if place.absolute().is_relative_to(directory.absolute()):
    raise UserError(
      f'config.{key}={path!r} lies in {directory}, which this run writes; give another --workdir.'
    )


def check_writable(directory: str) -> None:
  """ValueError unless config.checkpoint.directory can be made, if there is one."""
  if not directory:
    return
  try:
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
  except Exception as error:  # each kind of bucket has its own
    first = str(error).strip().partition('\n')[0]
    raise UserError(
      f'config.checkpoint.directory={directory!r} cannot be made: {first}. A bucket needs its '
      'package, gs:// `pip install gcsfs`.'
    ) from error
