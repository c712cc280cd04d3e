"""From a config to checked settings: names, types, and values against each other.

Each message names the key and the fix. Nothing here needs a file or a device: what does is checked
by the jobs.
"""

import dataclasses
import difflib
import functools
import math
import typing
from typing import Any

from ml_collections import ConfigDict

from segjax.config import conflicts, renamed
from segjax.config.reference_exact import apply_reference_exact
from segjax.config.settings import ACTIVATIONS, JOBS, Settings
from segjax.errors import UserError
from segjax.rl import aggregation, kl, losses, normalizer, rewards, segmentation


def from_config(config: ConfigDict) -> Settings:
  """The typed settings; ValueError names an unknown key, a wrong type, or values at odds."""
  settings = _build(Settings, config.copy_and_resolve_references().to_dict(), '')
  validate(settings)
  return apply_reference_exact(settings) if settings.reference_exact else settings


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, dict):
    raise UserError(f'config.{prefix[:-1]}={values!r} must be a section with keys of its own.')
  types = typing.get_type_hints(cls)
  made = {}
  for key, value in values.items():
    check_key(prefix + key)
    kind = types[key]
    if dataclasses.is_dataclass(kind):
      made[key] = _build(kind, value, f'{prefix}{key}.')
    else:
      renamed.check_value(prefix + key, value)
      made[key] = _typed(f'config.{prefix}{key}', value, kind)
  return cls(**made)


def _typed(key: str, value: Any, kind: Any) -> Any:
  """The value as `kind`; names in a tuple may also come joined by commas, as flags give them."""
  if typing.get_origin(kind) is tuple:
    parts = [value] if isinstance(value, str) else value
    return tuple(name.strip() for part in parts for name in part.split(',') if name.strip())
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f'{key}={value!r} must be of type {kind.__name__}.')
  if kind is float and not math.isfinite(value):
    raise UserError(f'{key}={value!r} must be finite.')
  return value


def check_key(key: str) -> None:
  """ValueError, naming the nearest keys that exist, unless `key` is a setting or a section."""
  leaves = setting_keys()
  if key in leaves or any(leaf.startswith(key + '.') for leaf in leaves):
    return
  renamed.check_key(key)
  last = key.rpartition('.')[2]
  near = difflib.get_close_matches(key, leaves, n=2, cutoff=0.6)
  near += [leaf for leaf in leaves if difflib.get_close_matches(last, [leaf.rpartition('.')[2]])]
  near = list(dict.fromkeys(near))[:3]
  hint = f'; did you mean {" or ".join("config." + name for name in near)}?' if near else '.'
  raise UserError(f'config.{key} does not exist{hint}')


def setting_keys(cls: type = Settings, prefix: str = '') -> list[str]:
  names = []
  for key, kind in typing.get_type_hints(cls).items():
    names += (
      setting_keys(kind, f'{prefix}{key}.') if dataclasses.is_dataclass(kind) else [prefix + key]
    )
  return names


def validate(settings: Settings) -> None:
  """Checks the values against each other; ValueError names the key and the fix."""
  _check_stages(settings)
  _check_choices(settings)
  _check_activations(settings)
  _check_ranges(settings)
  _check_lengths(settings)
  _check_divisibility(settings)
  _check_packing(settings)
  renamed.check_metric(settings.checkpoint.best_metric, 'checkpoint.best_metric')
  conflicts.check_conflicts(settings)


def resolve_spread(settings: Settings, granularity: str) -> str:
  """The way a segment's z is spread over its tokens, for that granularity."""
  name = settings.reward_shaping.spread
  if name == 'auto':
    return 'bandit' if granularity == 'bandit' else 'even_split'
  return name


def _check_stages(s: Settings) -> None:
  if not s.stages:
    raise UserError(f'config.stages is empty; name jobs out of {", ".join(JOBS)}.')
  for stage in s.stages:
    _check_choice('stages', stage, JOBS)
  in_order = tuple(job for job in JOBS if job in s.stages)
  if s.stages != in_order:
    raise UserError(f'config.stages={",".join(s.stages)} must be in order: {",".join(in_order)}.')
  if 'reward' in s.stages and s.reward_model.path:
    raise UserError(
      f'config.reward_model.path={s.reward_model.path!r}, but config.stages trains a reward model; '
      "empty the path, or leave 'reward' out of config.stages."
    )


def _check_choices(s: Settings) -> None:
  published = [f'published:{name}' for name in normalizer.PUBLISHED]
  for key, names in {
    'runtime.compute_dtype': ('float32', 'bfloat16'),
    'runtime.param_dtype': ('float32', 'bfloat16'),
    'runtime.frozen_params_memory': ('device', 'host'),
    'runtime.attention': ('auto', 'xla', 'cudnn', 'splash'),
    'data.overlong_policy': ('truncate_left', 'drop', 'error'),
    'reward_model.normalizer': ('', 'none', *published),
    'normalizer.kind': ('auto', *normalizer.KINDS),
    'normalizer.weighting': normalizer.WEIGHTINGS,
    'reward_shaping.spread': ('auto', *rewards.SPREADS),
    'reward_shaping.redistribute': ('none', 'red'),
    'reward_shaping.red_baseline': rewards.BASELINES,
    'reward_shaping.missing_eos_penalty': rewards.END_PENALTIES,
    'reward_shaping.length_penalty': rewards.LENGTH_PENALTIES,
    'ppo.kl_estimator': tuple(kl.ESTIMATORS),
    'ppo.kl_placement': ('reward', 'loss'),
    'ppo.gae_level': ('token', 'segment'),
    'ppo.loss_aggregation': losses.MEANS,
  }.items():
    _check_choice(key, _get(s, key), names)
  for section, empty in (('reward', ()), ('reward_model', ('',))):
    for name, names in {
      'granularity': segmentation.GRANULARITIES,
      'boundary': segmentation.CUTS,
      'stop_token': ('outside', 'inside'),
      'aggregation': tuple(aggregation.AGGREGATIONS),
    }.items():
      key = f'{section}.segmentation.{name}'
      _check_choice(key, _get(s, key), (*empty, *names))


def _check_activations(s: Settings) -> None:
  keep = [] if s.runtime.remat in ('none', 'full') else s.runtime.remat.split(',')
  offload = s.runtime.offload_activations.split(',') if s.runtime.offload_activations else []
  for key, names, others in (
    ('remat', keep, 'none, full, or '),
    ('offload_activations', offload, ''),
  ):
    for name in names:
      if name not in ACTIVATIONS:
        raise UserError(
          f'config.runtime.{key}: {name!r} is no activation; use {others}names out of '
          f'{",".join(ACTIVATIONS)}, joined by commas.'
        )
  both = sorted(set(keep) & set(offload))
  if both:
    raise UserError(
      f'config.runtime.remat and runtime.offload_activations both name {", ".join(both)}; it is '
      'kept in one '
      'place, on the device or on the host.'
    )
  if offload and s.runtime.remat == 'none':
    raise UserError(
      'config.runtime.offload_activations with remat=none: everything is kept on the device; set '
      'config.runtime.remat=full, or names.'
    )


def _check_choice(key: str, value: str, names: tuple[str, ...]) -> None:
  if value not in names:
    near = difflib.get_close_matches(value, names, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else '.'
    named = ', '.join(name or "''" for name in names)
    raise UserError(f'config.{key}={value!r} is not one of {named}{hint}')


# Keys by the least value they may have. A learning rate of 0 is a way to see what does not learn.
_MINIMUMS = {
  0: (
    *('data.max_rows', 'sft.max_steps', 'sft.micro_batch_size', 'evaluate.num_printed'),
    *('checkpoint.every_steps', 'checkpoint.every_minutes', 'checkpoint.max_failures', 'log_every'),
    *(
      'reward.eval_every',
      'ppo.eval_every',
      'report.every_steps',
      'report.eval_responses',
    ),
    *(
      'reward.max_steps',
      'reward.micro_batch_size',
      'reward.margin',
      'reward.rating_margin_coef',
    ),
    'reward.threshold_search.target_segment_length',
    *('critic.warmup_rollouts', 'reward_shaping.reward_clip'),
    *('rollout.temperature', 'rollout.top_k', 'rollout.max_concurrent', 'rollout.min_new_tokens'),
    *('sft.packing_length', 'reward.packing_length', 'ppo.packing_length'),
    *(
      'ppo.micro_batch_size',
      'ppo.scoring_batch_size',
      'ppo.kl_coef',
      'ppo.kl_target',
      'ppo.gamma',
    ),
    *('ppo.gae_lambda', 'ppo.clip_eps', 'ppo.clip_eps_high', 'ppo.value_clip_eps'),
    *(
      'ppo.dual_clip_ratio',
      'ppo.entropy_coef',
      'ppo.skip_if_kl_above',
      'ppo.skip_if_reward_above',
    ),
  ),
  1: (
    *(
      'max_skipped_steps',
      'data.max_length',
      'data.max_prompt_length',
      'runtime.logprob_chunk_size',
    ),
    *(
      'runtime.scan_unroll',
      'sft.batch_size',
      'sft.num_epochs',
      'reward.batch_size',
      'reward.num_epochs',
    ),
    *('rollout.samples_per_prompt', 'report.responses_per_rollout'),
    *(
      'reward.segmentation.segment_length',
      'reward.segmentation.min_segment_length',
    ),
    *(
      'reward.threshold_search.num_samples',
      'reward.threshold_search.batch_size',
    ),
    'reward.threshold_search.max_new_tokens',
    *(
      'normalizer.batch_size',
      'normalizer.max_pairs',
      'normalizer.min_bin_count',
      'rollout.max_new_tokens',
    ),
    *(
      'ppo.max_steps',
      'ppo.rollout_batch_size',
      'ppo.minibatch_size',
      'ppo.num_ppo_epochs',
      'ppo.kl_horizon',
    ),
    *('reward_shaping.length_threshold', 'compat.micro_batch_size'),
    *(
      'evaluate.batch_size',
      'evaluate.samples_per_prompt',
      'evaluate_reward.batch_size',
      'answers.batch_size',
    ),
    *('checkpoint.max_to_keep', 'demo.sft_rows', 'demo.pairs'),
  ),
}
_OPTIMIZERS = (
  'sft.optimizer',
  'reward.optimizer',
  'ppo.policy_optimizer',
  'ppo.critic_optimizer',
)


def _check_ranges(s: Settings) -> None:
  for least, keys in _MINIMUMS.items():
    for key in keys:
      if _get(s, key) < least:
        raise UserError(f'config.{key}={_get(s, key)} must be at least {least}.')
  quantile = s.reward.threshold_search.entropy_quantile
  if not 0 <= quantile < 1:
    raise UserError(
      f'config.reward.threshold_search.entropy_quantile={quantile} must be at least 0 '
      '(off) and below 1.'
    )
  if s.reward.segmentation.softmax_temperature <= 0:
    raise UserError('config.reward.segmentation.softmax_temperature must be above 0.')
  if 0 < s.ppo.dual_clip_ratio <= 1:
    raise UserError(
      f'config.ppo.dual_clip_ratio={s.ppo.dual_clip_ratio} must be above 1, or 0 for none.'
    )
  if not 0 < s.reward.holdout_fraction < 1:
    raise UserError(
      f'config.reward.holdout_fraction={s.reward.holdout_fraction} must lie between 0 and 1.'
    )
  if not 0 <= s.ppo.holdout_fraction < 1:
    raise UserError(
      f'config.ppo.holdout_fraction={s.ppo.holdout_fraction} must be at least 0 and below 1.'
    )
  if not 0 < s.rollout.top_p <= 1:
    raise UserError(f'config.rollout.top_p={s.rollout.top_p} must be above 0 and at most 1.')
  for key in _OPTIMIZERS:
    optimizer = _get(s, key)
    _check_choice(f'{key}.moments_dtype', optimizer.moments_dtype, ('float32', 'bfloat16'))
    if optimizer.learning_rate < 0:
      raise UserError(f'config.{key}.learning_rate={optimizer.learning_rate} is negative.')
    if not 0 <= optimizer.warmup_ratio <= 1:
      raise UserError(f'config.{key}.warmup_ratio={optimizer.warmup_ratio} is not in 0 to 1.')


def _get(settings: Settings, key: str) -> Any:
  return functools.reduce(getattr, key.split('.'), settings)


def _check_lengths(s: Settings) -> None:
  if s.data.max_prompt_length >= s.data.max_length:
    raise UserError(
      f'config.data.max_prompt_length={s.data.max_prompt_length} leaves no room for a response; '
      f'it must be less than config.data.max_length={s.data.max_length}.'
    )
  if s.rollout.min_new_tokens > s.rollout.max_new_tokens:
    raise UserError(
      f'config.rollout.min_new_tokens={s.rollout.min_new_tokens} is more than '
      f'config.rollout.max_new_tokens={s.rollout.max_new_tokens}.'
    )
  if s.demo.min_clauses > s.demo.max_clauses or s.demo.min_clauses < 1:
    raise UserError(
      f'config.demo.min_clauses={s.demo.min_clauses} must be from 1 to '
      f'config.demo.max_clauses={s.demo.max_clauses}.'
    )


def _check_packing(s: Settings) -> None:
  """Packed rows hold the longest sequence, and a micro-batch says how many there are at once."""
  longest = s.data.max_length, 'data.max_length'
  ppo = s.data.max_prompt_length + s.rollout.max_new_tokens
  for section, (size, what), least in (
    ('sft', longest, 1),
    ('reward', longest, 2),
    ('ppo', (ppo, 'data.max_prompt_length + rollout.max_new_tokens'), 1),
  ):
    width = _get(s, f'{section}.packing_length')
    if width and section in s.stages and width < size:
      raise UserError(
        f'config.{section}.packing_length={width} is less than {what} = {size}: a sequence could '
        'be '
        f'longer than its row; use {size} or more.'
      )
    if width and _get(s, f'{section}.micro_batch_size') < least:
      raise UserError(
        f'config.{section}.packing_length={width} needs config.{section}.micro_batch_size of at '
        'least '
        f'{least}: the packed rows that go through the network at once.'
      )


def _check_divisibility(s: Settings) -> None:
  for whole_key, keys in (
    (
      'ppo.rollout_batch_size',
      ('ppo.minibatch_size', 'ppo.scoring_batch_size', 'rollout.samples_per_prompt'),
    ),
    ('ppo.minibatch_size', ('ppo.micro_batch_size',)),
    ('reward.batch_size', ('reward.micro_batch_size',)),
    ('sft.batch_size', ('sft.micro_batch_size',)),
  ):
    whole = _get(s, whole_key)
    for key in keys:
      size = _get(s, key)
      if size and whole % size:
        below = max(d for d in range(1, size + 1) if whole % d == 0)
        raise UserError(
          f'config.{whole_key}={whole} is not divisible by config.{key}={size}; use {key}={below} '
          f'or {whole_key}={-(-whole // size) * size}.'
        )
