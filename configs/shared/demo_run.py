"""Settings of the demo, stage by stage, for two cores of a laptop without downloads.

The language has 16 clause templates over 8 animals and 6 places (segjax/data/demo_language.py).
"""

from ml_collections import ConfigDict

from configs.shared import model_sizes

STAGES = ('demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate')


def assign(config: ConfigDict, last_job: str) -> None:
  """Assigns the settings of the demo up to and including `last_job`."""
  config.stages = STAGES[: STAGES.index(last_job) + 1]
  config.network.update(model_sizes.tiny())
  config.runtime.remat = 'none'
  config.runtime.scan_unroll = config.network.num_hidden_layers
  config.demo.sft_rows = 16_384
  config.demo.pairs = 20_000
  config.data.max_length = 128
  config.data.max_prompt_length = 32

  config.sft.batch_size = 64
  config.sft.max_steps = 200
  config.sft.optimizer.learning_rate = 1e-2
  config.sft.optimizer.warmup_ratio = 0.05
  config.sft.optimizer.beta2 = 0.99

  # Adapters change what a network knows, and the demo's begins with random weights. At width 64 a
  # reward model of rank 8 is right in 92 % of the pairs instead of 95 %, which PPO exploits. By
  # adapters alone a policy ends with less of the true reward than by all weights, at rank 32 too:
  # its head maps as few as 64 hidden units to 112 tokens.
  config.lora.sft.rank = 0
  config.lora.reward.rank = 0
  config.lora.dpo.rank = 0
  config.lora.train_head = True
  config.lora.learning_rate_factor = 2.5

  config.reward.segmentation.entropy_threshold = 1.0  # nats; a clause starts above 1.5
  config.reward.batch_size = 64
  config.reward.max_steps = 900  # three epochs
  config.reward.entropy_cache_dir = 'run'  # else the reference would read every pair three times
  config.reward.holdout_fraction = 0.06
  config.reward.optimizer.learning_rate = 3e-3
  config.reward.optimizer.warmup_ratio = 0.05

  # At 0.1 a response of 17 tokens would have to differ from the other by tens of nats, and both
  # become unlikely.
  config.dpo.beta = 1.0
  config.dpo.batch_size = 64
  config.dpo.max_steps = 300  # one epoch
  config.dpo.holdout_fraction = 0.06
  config.dpo.optimizer.learning_rate = 3e-3
  config.dpo.optimizer.warmup_ratio = 0.05

  config.normalizer.max_pairs = 2048
  config.normalizer.batch_size = 128
  # Most responses have 2 to 5 segments; a few with more fill bins of one score each, which would
  # weigh as much as bins of a thousand.
  config.normalizer.weighting = 'count'

  config.rollout.max_new_tokens = 32
  config.ppo.max_steps = 45
  config.ppo.rollout_batch_size = 256
  config.ppo.minibatch_size = 64
  config.ppo.num_ppo_epochs = 2
  config.ppo.kl_coef = 0.15
  config.ppo.eval_every = 9
  config.ppo.holdout_fraction = 0.05
  config.ppo.policy_optimizer.learning_rate = 2e-3
  config.ppo.policy_optimizer.beta2 = 0.99
  config.ppo.critic_optimizer.learning_rate = 2e-3
  config.ppo.critic_optimizer.beta2 = 0.99

  config.evaluate.samples_per_prompt = 16
  config.evaluate.batch_size = 256  # as a rollout: the same programs
  config.evaluate.gold_reward_fn = 'segjax.data.languages:gold'
  config.evaluate.boundary_fn = 'segjax.data.demo_language:is_boundary'


def longer(config: ConfigDict) -> None:
  """Assigns the harder variant, with responses of 8 to 12 clauses."""
  config.demo.min_clauses = 8
  config.demo.max_clauses = 12
  config.rollout.max_new_tokens = 72
