"""Direct Preference Optimization (DPO) of a policy on preference pairs.

  python -m segjax.main --config=configs/dpo.py:local \\
    --config.policy.path=SFT_MODEL --config.data.path=PAIRS
  python -m segjax.main --config=configs/dpo.py:llama3_8b_sft

Presets: demo (the demo up to SFT and this job), local, smollm2_135m, smollm2_360m, qwen25_05b,
llama32_1b, llama32_3b, llama3_8b_sft, llama31_8b_instruct, llama3_70b, phi3_mini. The reference is
the policy before training unless config.reference.path names another. Method: Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290.

The trained policy may reward each token in PPO, beside a reward model with one score at the end
(reinforced token optimization, Zhong et al. 2024, https://arxiv.org/abs/2404.18922):

  python -m segjax.main --config=configs/ppo.py:local,bandit ... \\
    --config.reward_shaping.lm_reward.kind=implicit \\
    --config.reward_shaping.lm_reward.path=DPO_MODEL \\
    --config.reward_shaping.lm_reward.coef=0.05 --config.reward_shaping.lm_reward.clip=0.05
"""

from ml_collections import ConfigDict

from configs.shared import demo_run, local_run, model_sizes
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset."""
  name = presets.parse_preset(preset, ('demo', 'local', *model_sizes.SIZES)).name
  config = presets.default_config()
  config.stages = ('dpo',)
  if name == 'demo':
    demo_run.assign(config, last_job='sft')
    config.stages = (*config.stages, 'dpo')
  elif name == 'local':
    local_run.assign(config)
  else:
    config.seed = 42
    config.runtime.compute_dtype = 'bfloat16'
    config.network.update(model_sizes.SIZES[name]())
    config.policy.path = model_sizes.HUB.get(name, {}).get('policy', '')
    config.data.path = 'argilla/ultrafeedback-binarized-preferences-cleaned'
    config.data.max_length = min(2048, config.network.max_position_embeddings)
    config.data.max_prompt_length = 1728
    config.dpo.optimizer.learning_rate *= model_sizes.LADDER.get(name, 1.0)
    config.dpo.packing_length = 2048
    config.dpo.micro_batch_tokens = 4096
    config.checkpoint.every_steps = 256
  return config
