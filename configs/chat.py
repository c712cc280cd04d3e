"""Chat with a policy in the terminal.

  python -m segjax.main --config=configs/chat.py --config.policy.path=CHECKPOINT \\
    [--config.reward_model.path=REWARD_MODEL]

Answers are streamed. /segments shows the last answer in segments by the policy's entropies and,
with a reward model, their rewards. /again samples the answer anew from its worst segment on and
keeps the best of eight, if it scores higher. After `/best 8` each answer is the best of eight,
after `/best 8 segments` each of its segments is. Sampling is set by config.rollout:
`--config.rollout.temperature=0.7`.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config() -> ConfigDict:
  """Returns the settings of the job."""
  config = presets.default_config()
  config.stages = ('chat',)
  config.rollout.max_new_tokens = 512
  return config
