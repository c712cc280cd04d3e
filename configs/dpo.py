"""Direct Preference Optimization (DPO) of a policy on preference pairs.

  python -m segjax.main --config=configs/dpo.py:local \\
    --config.policy.path=SFT_MODEL --config.data.path=PAIRS
  python -m segjax.main --config=configs/dpo.py:llama3_8b_sft

Presets: demo (the demo up to SFT, then this job), local, llama3_8b_sft, llama31_8b_instruct,
llama3_70b.
The reference is the policy before training unless config.reference.path names another one. The
trained policy may also reward each token in PPO: `--config.reward_shaping.lm_reward.kind=implicit`.
Method: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.
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
    config.data.max_length = 2048
    config.data.max_prompt_length = 1728
    config.dpo.packing_length = 2048
    config.dpo.micro_batch_tokens = 4096
    config.checkpoint.every_steps = 256
  return config
