"""PPO on segment rewards.

  python -m segjax.main --config=configs/ppo.py                 the whole demo: minutes on two cores
  python -m segjax.main --config=configs/ppo.py:local \\
    --config.policy.path=... --config.reward_model.path=... --config.data.path=...
  python -m segjax.main --config=configs/ppo.py:llama3_8b_sft   the published run, 8 accelerators

Presets: demo, demo_long, local, llama3_8b_sft; `,token` or `,bandit` after one changes how text is
cut. Recipe: Yin et al. 2025, https://arxiv.org/abs/2501.02790.
"""

from ml_collections import ConfigDict

from configs import demo, models
from segjax import settings


def get_config(preset: str = 'demo') -> ConfigDict:
  """The settings of a preset, 'NAME[,segment|token|bandit]'."""
  name, granularity = settings.parse_preset(preset, ('demo', 'demo_long', 'local', 'llama3_8b_sft'))
  config = settings.default_config()
  config.stages = ('ppo',)
  if name in ('demo', 'demo_long'):
    demo.assign(config, last_job='evaluate')
    config.reward.granularity = granularity or 'segment'
    if name == 'demo_long':
      demo.longer(config)
  elif name == 'llama3_8b_sft':
    published(config, granularity or 'segment')
  else:
    config.reward_model.granularity = granularity  # '': as segment_reward.json says
  return config


def published(config: ConfigDict, granularity: str) -> None:
  """RLHFlow/LLaMA3-SFT-v2 on UltraFeedback: 59 rollouts of 1,024 prompts, one epoch."""
  config.seed = 42
  config.runtime.dtype = 'bfloat16'
  config.network.update(models.llama3_8b())
  config.policy.path = 'RLHFlow/LLaMA3-SFT-v2'
  config.reference.path = 'RLHFlow/LLaMA3-SFT-v2'
  config.data.path = 'argilla/ultrafeedback-binarized-preferences-cleaned'
  config.data.max_prompt_length = 1024

  config.reward_model.path = f'yyqoni/rlhflow-llama-3-sft-8b-v2-{granularity}-rm-700k'
  config.reward_model.granularity = granularity
  config.reward_model.entropy_threshold = 2.0  # nats
  config.reward_model.normalizer = f'published:llama3_8b_sft/{granularity}'

  config.rollout.max_new_tokens = 1024
  config.ppo.steps = 59
  config.ppo.rollout_batch = 1024
  config.ppo.minibatch = 128
  config.ppo.epochs = 1
  config.ppo.kl_coef = 0.01
  config.ppo.gamma = 1.0
  config.ppo.gae_lambda = 0.95
  config.ppo.clip_eps = 0.2
  config.ppo.value_clip_eps = 0.2 if granularity == 'bandit' else 0.25
  config.ppo.length_norm = granularity == 'token'
  config.ppo.policy_optimizer.learning_rate = 5e-7
  config.ppo.critic_optimizer.learning_rate = 9e-6
  config.checkpoint.every = 5
