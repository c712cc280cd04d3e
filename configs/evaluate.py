"""Comparison of policy and reference on held-out prompts.

  python -m segjax.main --config=configs/evaluate.py:local \\
    --config.policy.path=PPO_MODEL --config.reference.path=SFT_MODEL \\
    --config.reward_model.path=REWARD_MODEL --config.data.path=PROMPTS

Presets: demo (the whole demo), local.
"""

from ml_collections import ConfigDict

from configs.shared import demo_run, local_run
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset, 'NAME[,segment|token|bandit]'."""
  name, granularity, _ = presets.parse_preset(preset, ('demo', 'local'))
  config = presets.default_config()
  config.stages = ('evaluate',)
  if name == 'demo':
    demo_run.assign(config, last_job='evaluate')
    config.reward.segmentation.granularity = granularity or 'segment'
  else:
    local_run.assign(config)
    config.reward_model.segmentation.granularity = granularity or None
  return config
