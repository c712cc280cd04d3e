"""The invariants that matter, checked on the devices at hand in a minute or two.

  python -m segjax.main --config=configs/selfcheck.py

Nothing is downloaded or trained on data. Exit code 1 and the names of what failed if one does.
`--config.mesh.data=2 --config.mesh.fsdp=2` and the like choose the mesh that is held against one
device.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config(preset: str = 'default') -> ConfigDict:
  """The settings; there are no presets."""
  presets.parse_preset(preset, ('default',))
  config = presets.default_config()
  config.stages = ('selfcheck',)
  return config
