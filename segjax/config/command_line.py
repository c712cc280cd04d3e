"""Parses the flag --config and its overrides into settings.

`parse`, whose choices need jax, is imported where it is used, so that --help starts quickly.
"""

import re
from typing import ClassVar

from absl import flags
from ml_collections import config_flags

from segjax.config import config_files, renamed
from segjax.config.settings import Settings
from segjax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file with its preset: configs/ppo.py:local.', lock_config=True
)


_LINES = ('config.rewards', 'config.study.arms')  # tuples of lines of several words


class _DryRunParser(flags.ArgumentParser):
  """Parses `--dry_run`, which absl reads as `--dry_run=true`, and `--dry_run=full`."""

  _VALUES: ClassVar = {'true': 'short', 'full': 'full', 'false': '', '': ''}

  def parse(self, argument: str) -> str:
    """Returns 'short', 'full' or ''."""
    if argument not in self._VALUES:
      raise ValueError('use --dry_run or --dry_run=full')
    return self._VALUES[argument]


def define_dry_run() -> flags.FlagHolder:
  """Defines --dry_run, whose value is 'short', 'full' or ''."""
  text = 'Check the config and its inputs and print what differs from the defaults, or all (full).'
  return flags.DEFINE_flag(flags.Flag(_DryRunParser(), None, 'dry_run', '', text, boolean=True))


def settings_from_flags() -> tuple[Settings, str]:
  """Returns the settings from --config and its overrides, and the value of --config."""
  from segjax.config import parse

  if CONFIG.value is None:
    raise UserError('--config is missing; start with --config=configs/ppo.py')
  name = config_files.short_name(config_flags.get_config_filename(flags.FLAGS['config']))
  return parse.from_config(CONFIG.value), name


def parse_flags(arguments: list[str]) -> list[str]:
  """Parses the command line.

  Raises:
    UserError: a flag, a config file or a config key is unknown or has an old name.
  """
  from segjax.config import parse

  for argument in arguments[1:]:
    if match := re.match(r'--?(?:no)?([\w.]+)', argument):
      renamed.check_flag(match[1])
      if match[1].startswith('config.'):
        parse.check_key(match[1].removeprefix('config.'))
  arguments = _with_quoted_lines(_with_config_paths(arguments))
  try:
    remaining = flags.FLAGS(arguments)
  except flags.Error as error:
    raise UserError(root_cause(error)) from error
  if len(remaining) > 1:
    raise UserError(f'{remaining[1]!r} is not a flag; a preset is written JOB:PRESET.')
  return remaining


def _with_config_paths(arguments: list[str]) -> list[str]:
  """Replaces the value of --config, in both of its forms, by a path that exists."""
  resolved = list(arguments)
  for index, argument in enumerate(arguments):
    name, equals, value = argument.partition('=')
    if name in ('-config', '--config') and equals:
      resolved[index] = f'{name}={config_files.resolve(value)}'
    elif name in ('-config', '--config') and index + 1 < len(arguments):
      resolved[index + 1] = config_files.resolve(arguments[index + 1])
  return resolved


def _with_quoted_lines(arguments: list[str]) -> list[str]:
  """Quotes the values of `_LINES`, which ml_collections does not read with spaces in them."""
  quoted = list(arguments)
  for index, argument in enumerate(arguments):
    name, _, value = argument.partition('=')
    if name.lstrip('-') in _LINES and value and value[0] not in '(\'"':
      quoted[index] = f'{name}={tuple(value.split(","))!r}'
  return quoted


def root_cause(error: BaseException) -> str:
  """Returns the error's message in one line; that of its first cause if it holds a traceback."""
  while '\n' in str(error).strip() and error.__context__:
    error = error.__context__
  return str(error)
