"""Checks of the main invariants on the available devices, in two or three minutes.

  python -m segjax.main --config=configs/selfcheck.py

Nothing is downloaded and no data are needed. The exit code is 1 if a check fails, and its name is
printed. `--config.mesh.data=2 --config.mesh.fsdp=2` sets the mesh that is compared with one device.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config() -> ConfigDict:
  """Returns the settings of the job."""
  config = presets.default_config()
  config.stages = ('selfcheck',)
  return config
