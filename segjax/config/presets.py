"""The default config that config files start from, and the names of presets."""

import dataclasses
import types
import typing
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.rl.segmentation import GRANULARITIES


def default_config() -> ConfigDict:
  """Returns every setting with its default, for a config file to change."""
  return ConfigDict(_with_placeholders(Settings()))


def _with_placeholders(settings: Any) -> dict[str, Any]:
  """Returns the settings as a dict; None as a placeholder, which the command line can replace."""
  values = {}
  for key, kind in typing.get_type_hints(type(settings)).items():
    value = getattr(settings, key)
    if dataclasses.is_dataclass(value):
      value = _with_placeholders(value)
    elif value is None:
      kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
      value = config_dict.placeholder(typing.get_origin(kind) or kind)
    values[key] = value
  return values


class Preset(NamedTuple):
  """The parts of a preset's name; '' for a part that is not there."""

  name: str
  granularity: str
  topology: str


def parse_preset(preset: str, names: tuple[str, ...], topologies: tuple[str, ...] = ()) -> Preset:
  """Splits 'NAME[,segment|token|bandit][,TOPOLOGY]'; the parts after the name in any order.

  Raises:
    UserError: a part is unknown; the message lists the valid ones.
  """
  name, *parts = preset.split(',')
  _check_one_of(name, names, preset)
  fields = {'granularity': '', 'topology': ''}
  for part in parts:
    _check_one_of(part, (*GRANULARITIES, *topologies), preset)
    fields['granularity' if part in GRANULARITIES else 'topology'] = part
  return Preset(name, **fields)


def _check_one_of(value: str, names: tuple[str, ...], preset: str) -> None:
  if value not in names:
    raise UserError(
      f'preset {preset!r}: {value!r} is not one of {", ".join(names)}; presets are written '
      'NAME[,segment|token|bandit][,TOPOLOGY].'
    )
