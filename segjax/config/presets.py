"""What config files start from: every default, and how the name of a preset is read."""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.rl.segmentation import GRANULARITIES


def default_config() -> ConfigDict:
  """Every setting with its default, for a config file to change."""
  return ConfigDict(dataclasses.asdict(Settings()))


class Preset(NamedTuple):
  """What a config file is asked for; empty where it is not said."""

  name: str
  granularity: str
  topology: str


def parse_preset(preset: str, names: tuple[str, ...], topologies: tuple[str, ...] = ()) -> Preset:
  """'NAME[,segment|token|bandit][,TOPOLOGY]', the parts after the name in any order.

  Raises:
    ValueError: one is unknown; it lists the valid ones.
  """
  name, *parts = preset.split(',')
  _check_one_of(name, names, preset)
  found = {'granularity': '', 'topology': ''}
  for part in parts:
    _check_one_of(part, (*GRANULARITIES, *topologies), preset)
    found['granularity' if part in GRANULARITIES else 'topology'] = part
  return Preset(name, **found)


def _check_one_of(value: str, names: tuple[str, ...], preset: str) -> None:
  if value not in names:
    raise UserError(
      f'preset {preset!r}: {value!r} is not one of {", ".join(names)}; presets are written '
      'NAME[,segment|token|bandit][,TOPOLOGY].'
    )
