"""Training of the segment reward model on preference pairs, labels of steps, or both.

  python -m segjax.main --config=configs/reward.py:local \\
    --config.policy.path=SFT_MODEL --config.data.path=PAIRS
  python -m segjax.main --config=configs/reward.py:llama3_8b_sft

Presets: demo (the demo up to this job), local, smollm2_135m, smollm2_360m, qwen25_05b, llama32_1b,
llama32_3b, llama3_8b_sft, llama31_8b_instruct, llama3_70b, phi3_mini; `,token` or `,bandit` after
one sets the granularity, and the name of a topology (shared/topologies.py) the settings that fit
it. `--config.reference_exact=True` reproduces the
published code, mistakes included. Recipe: Yin et al. 2025, https://arxiv.org/abs/2501.02790.

Rows may be pairs, answers whose steps have labels (`segjax help rows`), or of either form:
--config.data.path=PAIRS,STEPS. Every update then has batch_size pairs and labelled answers in
proportion to the data, and minimises the loss of the pairs + reward.steps_weight times the binary
cross-entropy of the score at the ends of the steps. STEPS*0.5 reads half of the labelled answers.
"""

from ml_collections import ConfigDict

from configs.shared import demo_run, local_run, model_sizes, topologies
from segjax.config import presets


def get_config(preset: str = 'demo') -> ConfigDict:
  """Returns the settings of a preset, 'NAME[,segment|token|bandit][,TOPOLOGY]'."""
  names_of_topologies = topologies.names('reward', preset.partition(',')[0])
  names = ('demo', 'local', *model_sizes.SIZES)
  name, granularity, topology = presets.parse_preset(preset, names, names_of_topologies)
  config = presets.default_config()
  config.stages = ('reward',)
  if name == 'demo':
    demo_run.assign(config, last_job='reward')
  elif name == 'local':
    local_run.assign(config)
  elif name in model_sizes.SIZES:
    config.seed = 42
    config.runtime.compute_dtype = 'bfloat16'
    config.network.update(model_sizes.SIZES[name]())
    config.policy.path = model_sizes.HUB.get(name, {}).get('policy', '')
    config.data.path = 'hendrydong/preference_700K'
    # Phi-3's window is one token less than the paper's pairs have at most.
    config.data.max_length = min(2048, config.network.max_position_embeddings)
    config.data.max_prompt_length = 1728
    config.reward.segmentation.entropy_threshold = model_sizes.entropy_threshold(name)
    config.reward.batch_size = 128
    config.reward.num_epochs = 1
    config.reward.optimizer.learning_rate = 1e-6 * model_sizes.LADDER.get(name, 1.0)
    config.checkpoint.every_steps = 256
    topologies.assign(config, 'reward', name, topology)
  config.reward.segmentation.granularity = granularity or 'segment'
  return config
