"""The segment reward model, trained from preference pairs.

  python -m segjax.main --config=configs/reward.py:local \\
    --config.policy.path=SFT_MODEL --config.data.path=PAIRS
  python -m segjax.main --config=configs/reward.py:llama3_8b_sft

Presets: demo (the demo up to this job), local, llama3_8b_sft; `,token` or `,bandit` after one
changes how text is cut. Recipe: Yin et al. 2025, https://arxiv.org/abs/2501.02790.
"""

from ml_collections import ConfigDict

from configs import demo, models
from segjax import settings


def get_config(preset: str = 'demo') -> ConfigDict:
  """The settings of a preset, 'NAME[,segment|token|bandit]'."""
  name, granularity = settings.parse_preset(preset, ('demo', 'local', 'llama3_8b_sft'))
  config = settings.default_config()
  config.stages = ('reward',)
  if name == 'demo':
    demo.assign(config, last_job='reward')
  elif name == 'llama3_8b_sft':
    config.seed = 42
    config.runtime.dtype = 'bfloat16'
    config.network.update(models.llama3_8b())
    config.policy.path = 'RLHFlow/LLaMA3-SFT-v2'
    config.data.path = 'hendrydong/preference_700K'
    config.reward.entropy_threshold = 2.0  # nats
    config.reward.batch = 128
    config.reward.epochs = 1
    config.reward.optimizer.learning_rate = 1e-6
    config.checkpoint.every = 256
  config.reward.granularity = granularity or 'segment'
  return config
