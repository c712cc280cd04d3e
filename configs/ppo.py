"""PPO on segment rewards.

  python -m segjax.main --config=configs/ppo.py                 the whole demo: minutes on two cores
  python -m segjax.main --config=configs/ppo.py:local \\
    --config.policy.path=... --config.reward_model.path=... --config.data.path=...
  python -m segjax.main --config=configs/ppo.py:llama3_8b_sft,v5p:2x2x2        the published run

Presets: demo, demo_long, local, smollm2_135m, smollm2_360m, qwen25_05b, llama32_1b, llama32_3b,
llama3_8b_sft, llama31_8b_instruct, llama3_70b, phi3_mini; `,token` or `,bandit` after one sets the
granularity, and the name of a topology (shared/topologies.py) the settings that fit it.
`--config.reference_exact=True` reproduces the published code, mistakes included.
`--config.rewards='second path=... weight=0.5'` adds reward models and functions (`segjax help
rewards`). Recipe: Yin et al. 2025, https://arxiv.org/abs/2501.02790.

Below 8B no segment reward models were published. One is trained and calibrated first:

  segjax reward:smollm2_135m,v5e:2x4 --workdir=runs/small
  segjax normalizer:local --workdir=runs/small --config.runtime.compute_dtype=bfloat16 \\
    --config.reward_model.path=runs/small/reward/model \\
    --config.reference.path=HuggingFaceTB/SmolLM2-135M-Instruct \\
    --config.data.path=hendrydong/preference_700K --config.normalizer.max_pairs=4096
  segjax ppo:smollm2_135m,v5e:2x4 --workdir=runs/small \\
    --config.reward_model.path=runs/small/reward/model
"""

from ml_collections import ConfigDict

from configs.shared import demo_run, local_run, model_sizes, topologies
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset, 'NAME[,segment|token|bandit][,TOPOLOGY]'."""
  names = ('demo', 'demo_long', 'local', *model_sizes.SIZES)
  names_of_topologies = topologies.names('ppo', preset.partition(',')[0])
  name, granularity, topology = presets.parse_preset(preset, names, names_of_topologies)
  config = presets.default_config()
  config.stages = ('ppo',)
  if name in model_sizes.SIZES:
    published(config, name, granularity or 'segment')
    topologies.assign(config, 'ppo', name, topology)
  elif name == 'local':
    local_run.assign(config)
    config.reward_model.segmentation.granularity = granularity or None
  else:
    demo_run.assign(config, last_job='evaluate')
    config.reward.segmentation.granularity = granularity or 'segment'
    if name == 'demo_long':
      demo_run.longer(config)
  return config


def published(config: ConfigDict, name: str, granularity: str) -> None:
  """Assigns the settings of the paper's runs on UltraFeedback: 59 rollouts of 1,024 prompts."""
  config.seed = 42
  config.runtime.compute_dtype = 'bfloat16'
  config.network.update(model_sizes.SIZES[name]())
  config.data.path = 'argilla/ultrafeedback-binarized-preferences-cleaned'
  config.data.max_prompt_length = 1024

  hub = model_sizes.HUB.get(name, {})  # no 70B models were published; their paths must be set
  if 'policy' in hub:
    config.policy.path = config.reference.path = hub['policy']
  if 'reward_model' in hub:
    config.reward_model.path = hub['reward_model'].format(granularity)
    config.reward_model.normalizer = f'published:{name}/{granularity}'
  if name not in model_sizes.LADDER:  # whose segment_reward.json says how it was trained
    config.reward_model.segmentation.granularity = granularity
    config.reward_model.segmentation.entropy_threshold = model_sizes.entropy_threshold(name)

  config.rollout.max_new_tokens = 1024
  config.ppo.max_steps = 59
  config.ppo.rollout_batch_size = 1024
  config.ppo.minibatch_size = 128
  config.ppo.num_ppo_epochs = 1
  config.ppo.kl_coef = 0.01
  config.ppo.gamma = 1.0
  config.ppo.gae_lambda = 0.95
  config.ppo.clip_eps = 0.2
  config.ppo.value_clip_eps = 0.2 if granularity == 'bandit' else 0.25
  factor = model_sizes.LADDER.get(name, 1.0)
  config.ppo.policy_optimizer.learning_rate = 5e-7 * factor
  config.ppo.critic_optimizer.learning_rate = 9e-6 * factor
  config.checkpoint.every_steps = 5

  if name == 'phi3_mini':
    config.ppo.max_steps = 118  # two passes over the prompts
    config.data.max_prompt_length = 1023  # published: 1024, one more than its window leaves
    threshold = '@1.75' if granularity == 'segment' else ''
    config.reward_model.normalizer = f'published:phi3_mini_instruct/{granularity}{threshold}'
  if (name, granularity) == ('llama3_8b_sft', 'token'):
    config.reward_shaping.length_norm = True
  if (name, granularity) == ('llama31_8b_instruct', 'segment'):
    config.reward_shaping.missing_eos_penalty = 'per_token'
    config.reward_shaping.missing_eos_penalty_value = -0.05
    config.reward_shaping.length_penalty = 'threshold'
    config.reward_shaping.length_penalty_value = -0.05
    config.reward_shaping.length_threshold = 800
