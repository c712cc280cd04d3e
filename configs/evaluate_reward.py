"""Agreement of a reward model with human judgements of pairs and of spans.

  python -m segjax.main --config=configs/evaluate_reward.py \\
    --config.reward_model.path=REWARD_MODEL --config.reference.path=SFT_MODEL \\
    --config.evaluate_reward.pairs=PAIRS,MORE_PAIRS --config.evaluate_reward.spans=SPANS

A reward model without segment_reward.json needs its granularity and normalizer in
config.reward_model. The reference is only needed if its entropy sets the segment boundaries.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config() -> ConfigDict:
  """Returns the settings of the job."""
  config = presets.default_config()
  config.stages = ('evaluate_reward',)
  return config
