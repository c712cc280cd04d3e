"""Fit of a reward model's normalizer by relative position, stored next to its weights.

  python -m segjax.main --config=configs/normalizer.py:local \\
    --config.reward_model.path=REWARD_MODEL --config.reference.path=SFT_MODEL \\
    --config.data.path=PAIRS

Presets: demo (the demo up to this job), local; `,token` or `,bandit` after local is the
granularity of a reward model without segment_reward.json.
"""

from ml_collections import ConfigDict

from configs.shared import demo_run
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset, 'NAME[,segment|token|bandit]'."""
  name, granularity, _ = presets.parse_preset(preset, ('demo', 'local'))
  config = presets.default_config()
  config.stages = ('normalizer',)
  if name == 'demo':
    demo_run.assign(config, last_job='normalizer')
    config.reward.segmentation.granularity = granularity or 'segment'
  else:
    config.reward_model.segmentation.granularity = granularity or None
  return config
