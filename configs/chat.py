"""Chat with a policy in the terminal.

  python -m segjax.main --config=configs/chat.py --config.policy.path=CHECKPOINT \\
    [--config.reward_model.path=REWARD_MODEL]

Answers are streamed. /segments shows the last answer in segments by the policy's entropies and,
with a reward model, their rewards. Sampling is set by config.rollout:
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
