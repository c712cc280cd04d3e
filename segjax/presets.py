"""What config files start from: every default, and how the name of a preset is read."""

import dataclasses

from ml_collections import ConfigDict

from segjax.rl.segmentation import GRANULARITIES
from segjax.settings import Settings


def default_config() -> ConfigDict:
  """Every setting with its default, for a config file to change."""
  return ConfigDict(dataclasses.asdict(Settings()))


def parse_preset(preset: str, names: tuple[str, ...]) -> tuple[str, str]:
  """'NAME[,segment|token|bandit]' as (name, granularity), the granularity '' if not named.

  Raises:
    ValueError: either is unknown; it lists the valid ones.
  """
  name, _, granularity = preset.partition(',')
  _check_one_of(name, names, preset)
  if granularity:
    _check_one_of(granularity, GRANULARITIES, preset)
  return name, granularity


def _check_one_of(value: str, names: tuple[str, ...], preset: str) -> None:
  if value not in names:
    raise ValueError(
      f'preset {preset!r}: {value!r} is not one of {", ".join(names)}; presets are written '
      'NAME[,segment|token|bandit].'
    )
