"""Builds typed settings from a config; checks the names of keys and the types of values.

The values themselves are checked by `validate`. Nothing here needs a file or a device.
"""

import dataclasses
import difflib
import functools
import typing
from operator import attrgetter
from typing import Any

from ml_collections import ConfigDict

from segjax.config import renamed
from segjax.config.field_checks import typed
from segjax.config.reference_exact import apply_reference_exact
from segjax.config.settings import Settings
from segjax.config.validate import limit_to_batches, validate
from segjax.errors import UserError


def from_config(config: ConfigDict) -> Settings:
  """Returns the checked settings of a config.

  Raises:
    UserError: a key is unknown, a value has the wrong type or range, or two values conflict.
  """
  settings = _build(Settings, config.copy_and_resolve_references().to_dict(), '')
  settings = limit_to_batches(settings)
  validate(settings)
  return apply_reference_exact(settings) if settings.reference_exact else settings


def check_key(key: str) -> None:
  """Raises UserError, with the nearest existing keys, unless `key` is a setting or a section."""
  leaves = setting_keys()
  if key in leaves or any(leaf.startswith(key + '.') for leaf in leaves):
    return
  renamed.check_key(key)
  last = key.rpartition('.')[2]
  near = difflib.get_close_matches(key, leaves, n=2, cutoff=0.6)
  near += [leaf for leaf in leaves if difflib.get_close_matches(last, [leaf.rpartition('.')[2]])]
  # The right name in the wrong section first.
  near.sort(key=lambda leaf: leaf.rpartition('.')[2] != last)
  near = list(dict.fromkeys(near))[:3]
  hint = f'; did you mean {" or ".join("config." + name for name in near)}?' if near else '.'
  raise UserError(f'config.{key} does not exist{hint}')


@functools.cache  # each key of a config is compared with all of them
def setting_keys(cls: type = Settings, prefix: str = '') -> tuple[str, ...]:
  """Returns the dotted keys of all settings, sections left out."""
  names: tuple[str, ...] = ()
  for key, kind in typing.get_type_hints(cls).items():
    names += (
      setting_keys(kind, f'{prefix}{key}.') if dataclasses.is_dataclass(kind) else (prefix + key,)
    )
  return names


def changed_values(settings: Settings) -> dict[str, Any]:
  """Returns the settings that differ from their defaults, by dotted key."""
  values, defaults = (
    {key: attrgetter(key)(s) for key in setting_keys()} for s in (settings, Settings())
  )
  return {key: value for key, value in values.items() if value != defaults[key]}


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, dict):
    raise UserError(f'config.{prefix[:-1]}={values!r} must be a section with keys of its own.')
  kinds = typing.get_type_hints(cls)
  fields = {}
  for key, value in values.items():
    check_key(prefix + key)
    if dataclasses.is_dataclass(kinds[key]):
      fields[key] = _build(kinds[key], value, f'{prefix}{key}.')
    else:
      renamed.check_value(prefix + key, value)
      fields[key] = typed(f'config.{prefix}{key}', value, kinds[key])
  return cls(**fields)
