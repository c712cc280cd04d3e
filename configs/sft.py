"""Supervised fine-tuning on chat rows, with the loss on the assistant's turns.

  python -m segjax.main --config=configs/sft.py:local \\
    --config.policy.path=MODEL --config.data.path=CHATS

Presets: demo (the demo up to this job), local.
"""

from ml_collections import ConfigDict

from configs.shared import demo_run, local_run
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset."""
  name = presets.parse_preset(preset, ('demo', 'local')).name
  config = presets.default_config()
  config.stages = ('sft',)
  if name == 'demo':
    demo_run.assign(config, last_job='sft')
  else:
    local_run.assign(config)
  return config
