"""Ranks methods of dense reward by the credit that they give, without a PPO run.

  python -m segjax.main --config=configs/credit.py

Presets: requests, delayed, bifurcation (the built-in languages whose true credit is known), each
with a reward model of segments, or 'NAME,token' and 'NAME,bandit'.
"""

from ml_collections import ConfigDict

from configs.shared import demo_run
from segjax.config import presets


def get_config(preset: str = 'requests') -> ConfigDict:
  """Returns the settings of a preset, 'NAME[,segment|token|bandit]'."""
  name, granularity, _ = presets.parse_preset(preset, ('requests', 'delayed', 'bifurcation'))
  config = presets.default_config()
  demo_run.assign(config, last_job='normalizer')
  config.stages = (*config.stages, 'credit')
  config.demo.language = name
  config.sft.max_steps = 400  # contents are looked up in the prompt, which takes longer to learn
  config.reward.segmentation.granularity = granularity or 'segment'
  config.evaluate.credit_fn = 'segjax.data.languages:true_credit'
  config.evaluate.samples_per_prompt = 4
  return config
