"""Talk to a policy in the terminal.

  python -m segjax.main --config=configs/chat.py --config.policy.path=CHECKPOINT \\
    [--config.reward_model.path=REWARD_MODEL]

Answers stream; /segments shows the last one cut by the policy's entropies and, with a reward model,
what each segment earns. `--config.rollout.temperature=0.7` and the like say how they are sampled.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config(preset: str = 'default') -> ConfigDict:
  """The settings; there are no presets."""
  presets.parse_preset(preset, ('default',))
  config = presets.default_config()
  config.stages = ('chat',)
  config.rollout.max_new_tokens = 512
  return config
