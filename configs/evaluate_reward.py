"""A reward model against human judgements of pairs and of spans.

  python -m segjax.main --config=configs/evaluate_reward.py \\
    --config.reward_model.path=REWARD_MODEL --config.reference.path=SFT_MODEL \\
    --config.evaluate_reward.pairs=PAIRS,MORE_PAIRS --config.evaluate_reward.spans=SPANS

`,token` or `,bandit` after the preset names the granularity of a reward model that has no
segment_reward.json. The reference is only needed where segments are cut by its entropy.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config(preset: str = 'default') -> ConfigDict:
  """The settings of a preset, 'default[,segment|token|bandit]'."""
  _, granularity, _ = presets.parse_preset(preset, ('default', 'local'))
  config = presets.default_config()
  config.stages = ('evaluate_reward',)
  config.reward_model.segmentation.granularity = granularity or None
  return config
