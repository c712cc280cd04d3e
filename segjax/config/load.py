"""Settings from a Python call: a preset such as 'ppo:demo', a config file, or values."""

import contextlib
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from segjax.config import config_files, parse, presets, usage
from segjax.config.settings import Settings

Config = str | Path | Mapping[str, Any] | ConfigDict


def load_settings(config: Config, overrides: Mapping[str, Any]) -> tuple[Settings, str]:
  """Returns checked settings, and the name of the config.

  Args:
    config: JOB[:PRESET], a config file with its preset, a ConfigDict, or values that replace
      defaults.
    overrides: values by dotted key or as nested dicts.

  Raises:
    UserError: there is no such config, a key is unknown, or a value is wrong.
  """
  if isinstance(config, str | Path):
    loaded, name = _run_file(str(config))
  else:
    loaded, name = presets.default_config(), ''
    is_complete = isinstance(config, ConfigDict)
    values = config.copy_and_resolve_references().to_dict() if is_complete else config
    overrides = _flatten(values) | _flatten(overrides)
  values = loaded.copy_and_resolve_references().to_dict()
  for key, value in _flatten(overrides).items():
    parse.check_key(key)
    *sections, last = key.split('.')
    section = values
    for part in sections:
      section = section[part]
    section[last] = value
  return parse.from_config(ConfigDict(values)), name


def _run_file(config: str) -> tuple[ConfigDict, str]:
  """Returns the config of a file or of JOB[:PRESET], and its name."""
  name = config
  if '/' not in name and not name.partition(':')[0].endswith('.py'):
    name = usage.config_argument(name).removeprefix('--config=')
  path, _, preset = config_files.resolve(name).partition(':')
  with _shipped_configs_importable():
    get_config = runpy.run_path(path)['get_config']
    loaded = get_config(preset) if preset else get_config()
  return loaded, name


@contextlib.contextmanager
def _shipped_configs_importable() -> Iterator[None]:
  """Lets config files import configs.shared."""
  root = str(config_files.shipped_root())
  sys.path.append(root)
  try:
    yield
  finally:
    sys.path.remove(root)


def _flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the values by dotted key."""
  flat = {}
  for key, value in values.items():
    is_section = isinstance(value, Mapping) and value
    flat |= _flatten(value, f'{prefix}{key}.') if is_section else {f'{prefix}{key}': value}
  return flat
