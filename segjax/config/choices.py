"""The valid values of settings: choices by key, and minimums by key.

Choices come from the table of the code that implements them; those of the network and of the data,
which import this module, are defined here.
"""

from segjax.rl import (
  advantages,
  aggregation,
  critic_free,
  cuts,
  kl,
  learned_tokens,
  lm_rewards,
  losses,
  normalizer,
  rewards,
  segmentation,
  spreads,
)

DTYPES = ('float32', 'bfloat16')
ROLLOUT_WEIGHTS = ('compute_dtype', 'int8')
# What weight decay reaches, by the ends of the parameters' paths: a scale or bias has one value per
# unit, and an embedding moves only with the tokens that occur. A and B of adapters are kernels.
_KERNELS = ('kernel', '/a', '/b')
DECAYED_WEIGHTS = {'kernels': _KERNELS, 'matrices': (*_KERNELS, 'embedding'), 'all': ('',)}
FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'phi3')  # as model_type of config.json
ATTENTION = ('xla', 'cudnn', 'flash', 'splash')
LANGUAGES = ('describe', 'requests', 'delayed', 'bifurcation')
OVERLONG_POLICIES = ('truncate_left', 'drop', 'error')
# Activations of a layer, in order, that can be saved for the backward pass: its input, the
# projections with rotary positions, the attention output, its sum with the input, the MLP's halves.
ACTIVATIONS = ('hidden', 'query', 'key', 'value', 'attention', 'residual', 'gate', 'up')
OPTIMIZERS = (
  'sft.optimizer',
  'reward.optimizer',
  'dpo.optimizer',
  'ppo.policy_optimizer',
  'ppo.critic_optimizer',
)

_SEGMENTATION = {
  'granularity': segmentation.GRANULARITIES,
  'boundary': tuple(cuts.CUTS),
  'aggregation': tuple(aggregation.AGGREGATIONS),
}
CHOICES: dict[str, tuple[str, ...]] = {
  'runtime.compute_dtype': DTYPES,
  'runtime.param_dtype': DTYPES,
  'runtime.frozen_params_memory': ('device', 'host'),
  'runtime.attention': ('auto', *ATTENTION),
  'network.family': FAMILIES,
  'demo.language': LANGUAGES,
  'data.overlong_policy': OVERLONG_POLICIES,
  'data.bad_rows': ('error', 'drop'),
  'reward_model.normalizer': (
    '',
    'none',
    *(f'published:{name}' for name in normalizer.PUBLISHED),
  ),
  'reward_model.reads': ('auto', 'tokens', 'text'),
  'reward_model.head': ('auto', 'scalar', 'labels', 'tokens'),
  'normalizer.kind': ('auto', *normalizer.KINDS),
  'normalizer.weighting': normalizer.WEIGHTINGS,
  'rollout.weights_dtype': ROLLOUT_WEIGHTS,
  'reward_shaping.spread': ('auto', *spreads.SPREADS),
  'reward_shaping.credit': spreads.CREDITS,
  'reward_shaping.redistribute': ('none', 'red', 'gradient', 'attention'),
  'reward_shaping.red_baseline': rewards.BASELINES,
  'reward_shaping.mix': ('token', 'segment'),
  'reward_shaping.lm_reward.kind': ('off', *lm_rewards.KINDS),
  'reward_shaping.lm_reward.level': lm_rewards.LEVELS,
  'reward_shaping.reward_fn_on_error': ('stop', 'zero'),
  'sample.rank_by': ('score', 'reward'),
  'sample.search': ('response', 'segment'),
  'reward_shaping.missing_eos_penalty': rewards.END_PENALTIES,
  'reward_shaping.length_penalty': rewards.LENGTH_PENALTIES,
  'ppo.kl_estimator': tuple(kl.ESTIMATORS),
  'ppo.kl_placement': ('reward', 'loss'),
  'ppo.estimator': ('gae', *critic_free.ESTIMATORS),
  'ppo.gae_level': tuple(advantages.GAE_LEVELS),
  'ppo.loss_aggregation': losses.MEANS,
  'ppo.learn_on': learned_tokens.LEARN_ON,
  **{
    f'{section}.segmentation.{name}': names
    for section in ('reward', 'reward_model')
    for name, names in _SEGMENTATION.items()
  },
  **{f'{optimizer}.moments_dtype': DTYPES for optimizer in OPTIMIZERS},
  **{f'{optimizer}.decayed_weights': tuple(DECAYED_WEIGHTS) for optimizer in OPTIMIZERS},
}


def _keys(section: str, names: str) -> list[str]:
  return [f'{section}.{name}' for name in names.split()]


_AT_LEAST_0 = (
  'seed',
  'log_every',
  *_keys('data', 'max_rows'),
  *_keys('sft', 'max_steps micro_batch_size micro_batch_tokens packing_length eval_every'),
  *(
    key
    for section in ('reward', 'dpo')
    for key in _keys(
      section,
      'max_steps micro_batch_size micro_batch_tokens packing_length eval_every margin '
      'rating_margin_coef label_smoothing',
    )
  ),
  *_keys('reward', 'threshold_search.target_segment_length steps_weight'),
  *_keys('reward.segmentation', 'jump_threshold shuffle_seed'),
  *_keys('reward_model.segmentation', 'jump_threshold shuffle_seed'),
  *_keys('critic', 'warmup_rollouts'),
  *_keys('lora', 'rank sft.rank reward.rank dpo.rank policy.rank critic.rank'),
  *_keys('rollout', 'temperature top_k max_concurrent tensor min_new_tokens'),
  *_keys('reward_shaping', 'reward_clip std_floor_ratio lm_reward.coef lm_reward.clip'),
  *_keys('reward_shaping', 'disagreement_coef'),
  *_keys('reward_shaping', 'reward_fn_concurrency reward_fn_timeout reward_fn_retries'),
  *_keys('ppo', 'micro_batch_size micro_batch_tokens scoring_batch_size packing_length eval_every'),
  *_keys('ppo', 'kl_coef kl_target gamma gae_lambda clip_eps clip_eps_high dual_clip_ratio'),
  *_keys('ppo', 'importance_clip lambda_length_factor value_gae_lambda'),
  *_keys('ppo', 'value_clip_eps entropy_coef skip_if_kl_above skip_if_reward_above'),
  *_keys('evaluate', 'num_printed'),
  *_keys('checkpoint', 'every_steps every_minutes max_failures'),
  *_keys('report', 'every_steps eval_responses'),
  *_keys('study', 'trials'),
  # A learning rate of 0 freezes a network; `no_effect` refuses it where nothing else is trained.
  *(
    f'{optimizer}.{name}'
    for optimizer in OPTIMIZERS
    for name in ('learning_rate', 'weight_decay', 'max_grad_norm')
  ),
)
_AT_LEAST_1 = (
  'max_skipped_steps',
  *_keys('data', 'max_length max_prompt_length'),
  *_keys('runtime', 'vocab_chunk_size scan_unroll'),
  *_keys('sft', 'batch_size num_epochs'),
  *_keys('reward', 'batch_size num_epochs'),
  *_keys('dpo', 'batch_size num_epochs'),
  *_keys('reward.segmentation', 'segment_length min_segment_length'),
  *_keys('reward_model.segmentation', 'segment_length min_segment_length'),
  *_keys('reward.threshold_search', 'num_samples batch_size max_new_tokens'),
  *_keys('normalizer', 'batch_size max_pairs min_bin_count'),
  *_keys('rollout', 'samples_per_prompt max_new_tokens'),
  *_keys('reward_shaping', 'length_threshold'),
  *_keys('ppo', 'max_steps rollout_batch_size minibatch_size num_ppo_epochs kl_horizon'),
  *_keys('compat', 'micro_batch_size'),
  *_keys('evaluate', 'batch_size samples_per_prompt'),
  *_keys('sample', 'batch_size samples_per_prompt keep'),
  *_keys('evaluate_reward', 'batch_size'),
  *_keys('answers', 'batch_size'),
  *_keys('checkpoint', 'max_to_keep'),
  *_keys('report', 'responses_per_rollout'),
  *_keys('demo', 'sft_rows pairs'),
  *_keys('study', 'jobs'),
)
MINIMUMS: dict[str, int] = {
  **dict.fromkeys(_AT_LEAST_0, 0),
  **dict.fromkeys(_AT_LEAST_1, 1),
  'sample.segment_tokens': 2,  # the last of a segment that goes on is drawn again
}
