"""Old names of flags, keys, values and metrics; using one is an error that gives the new name.

Nothing is translated silently, so that command lines and configs are updated.
"""

from segjax.errors import UserError

FLAGS = {
  'mirror': 'local_copy',
  'processes': 'num_processes',
  'process': 'process_id',
  'compilation_cache': 'compilation_cache_dir',
  'profile_steps': 'config.profile_steps',
}

_SECTIONS = {'shaping': 'reward_shaping', 'reward.calibration': 'reward.threshold_search'}

_TRAINING = {
  'batch': 'batch_size',
  'micro_batch': 'micro_batch_size',
  'packed_length': 'packing_length',
  'epochs': 'num_epochs',
  'steps': 'max_steps',
}
_SEGMENTATION = {
  'cut': 'boundary',
  'min_length': 'min_segment_length',
  'fixed_length': 'segment_length',
  'stop_token': 'include_eos',
  'temperature': 'softmax_temperature',
}
_OPTIMIZER = {'min_ratio': 'min_lr_ratio'}
# By the present name of the section: old leaf -> new leaf.
_KEYS = {
  '': {'max_bad_steps': 'max_skipped_steps'},
  'sft': _TRAINING,
  'reward': _TRAINING
  | {
    'entropy_cache': 'entropy_cache_dir',
    'holdout': 'holdout_fraction',
    'rating_margin': 'rating_margin_coef',
  },
  'reward.segmentation': _SEGMENTATION,
  'reward_model.segmentation': _SEGMENTATION,
  'reward.threshold_search': {'samples': 'num_samples', 'batch': 'batch_size'},
  'normalizer': {'pairs': 'max_pairs', 'min_count': 'min_bin_count', 'batch': 'batch_size'},
  'rollout': {'samples': 'samples_per_prompt', 'slots': 'max_concurrent'},
  'reward_shaping': {
    'end_penalty': 'missing_eos_penalty',
    'end_penalty_value': 'missing_eos_penalty_value',
  },
  'ppo': {
    'steps': 'max_steps',
    'rollout_batch': 'rollout_batch_size',
    'minibatch': 'minibatch_size',
    'micro_batch': 'micro_batch_size',
    'packed_length': 'packing_length',
    'epochs': 'num_ppo_epochs',
    'holdout': 'holdout_fraction',
    'score_batch': 'scoring_batch_size',
    'kl_in': 'kl_placement',
    'max_kl': 'skip_if_kl_above',
    'max_reward': 'skip_if_reward_above',
    'gae_over': 'gae_level',
    'dual_clip': 'dual_clip_ratio',
    'loss_mean': 'loss_aggregation',
  },
  'critic': {'warmup_steps': 'warmup_rollouts'},
  'data': {'limit': 'max_rows', 'overlong': 'overlong_policy'},
  'sft.optimizer': _OPTIMIZER,
  'reward.optimizer': _OPTIMIZER,
  'ppo.policy_optimizer': _OPTIMIZER,
  'ppo.critic_optimizer': _OPTIMIZER,
  'runtime': {
    'dtype': 'compute_dtype',
    'weights_dtype': 'param_dtype',
    'frozen_memory': 'frozen_params_memory',
    'offload': 'offload_activations',
    'unroll': 'scan_unroll',
    'logprob_chunk': 'vocab_chunk_size',
    'logprob_chunk_size': 'vocab_chunk_size',
  },
  'evaluate': {
    'samples': 'samples_per_prompt',
    'batch': 'batch_size',
    'gold': 'gold_reward_fn',
    'boundary': 'boundary_fn',
    'show': 'num_printed',
  },
  'evaluate_reward': {'batch': 'batch_size'},
  'answers': {'name': 'model_name', 'batch': 'batch_size'},
  'checkpoint': {
    'minutes': 'every_minutes',
    'every': 'every_steps',
    'keep': 'max_to_keep',
    'best': 'best_metric',
    'max_misses': 'max_failures',
  },
  'report': {
    'every': 'every_steps',
    'responses': 'responses_per_rollout',
    'evaluated': 'eval_responses',
  },
  'compat': {
    'row0_mask': 'first_row_attention_mask',
    'micro_batch': 'micro_batch_size',
    'zero_bin': 'keep_zero_bin',
    'pairs_uncleaned': 'keep_degenerate_pairs',
    'without_preamble': 'strip_system_preamble',
    'scalar_unpenalised': 'bandit_skips_penalties',
  },
}

_VALUES: dict[tuple[str, object], object] = {('normalizer.weighting', 'bin'): 'uniform'}

_METRICS = {
  'bad': 'skipped_updates',
  'reward/z_by_position': 'reward/by_position',
  'reward/token_max': 'reward/token_abs_max',
  'rollout/sampling_gap': 'rollout/logprob_mismatch',
  'rollout/sampling_gap_max': 'rollout/logprob_mismatch_max',
  'policy/first_ratio_max_deviation': 'policy/initial_ratio_deviation',
  'eval/longer_wins': 'eval/length_baseline_accuracy',
  'eval/calibration_error': 'eval/ece',
  'perf/fill': 'perf/packing_efficiency',
  'perf/compiles': 'perf/num_compiles',
  'perf/memory_gib': 'perf/peak_memory_gib',
  'timing/wait': 'timing/between_steps',
}


def check_flag(name: str) -> None:
  """Raises UserError, with the present name, if `name` is an old flag."""
  if name in FLAGS:
    raise UserError(f'--{name} is now --{FLAGS[name]}')


def check_key(key: str) -> None:
  """Raises UserError, with the present name, if `key` is an old config key or section."""
  if (present := _present_key(key)) != key:
    raise UserError(f'config.{key} is now config.{present}')


def check_value(key: str, value: object) -> None:
  """Raises UserError, with the present value, if `value` is an old value of the key."""
  if (present := _VALUES.get((key, value))) is not None:
    raise UserError(f'config.{key}={value} is now config.{key}={present}')


def check_metric(name: str, prefix: str) -> None:
  """Raises UserError, with the present name, if `name` is an old metric.

  Args:
    name: of a metric.
    prefix: text before the name in the message, such as `config.checkpoint.best_metric=`.
  """
  section, _, leaf = name.partition('/')
  if section == 'val':
    present = f'critic/{leaf}'
  elif section == 'train':
    present = f'sft/{leaf} in SFT and reward_model/{leaf} in reward training'
  elif name.startswith('reward/z_by_position/'):
    present = name.replace('z_by_position', 'by_position')
  else:
    present = _METRICS.get(name, name)
  if present != name:
    raise UserError(f'{prefix}{name} is now {present}')


def _present_key(key: str) -> str:
  for old, new in _SECTIONS.items():
    if key == old or key.startswith(f'{old}.'):
      key = new + key.removeprefix(old)
  section, _, leaf = key.rpartition('.')
  leaf = _KEYS.get(section, {}).get(leaf, leaf)
  return f'{section}.{leaf}' if section else leaf
