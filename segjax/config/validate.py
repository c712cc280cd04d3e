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

from segjax.config import conflicts
from segjax.config.reference_exact import as_published
from segjax.config.settings import ACTIVATIONS, JOBS, Settings
from segjax.rl import aggregation, kl, losses, normalizer, rewards, segmentation


def from_config(config: ConfigDict) -> Settings:
  """The typed settings; ValueError names an unknown key, a wrong type, or values at odds."""
  settings = _build(Settings, config.copy_and_resolve_references().to_dict(), '')
  validate(settings)
  return as_published(settings) if settings.reference_exact else settings


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, dict):
    raise ValueError(f'config.{prefix[:-1]}={values!r} must be a section with keys of its own.')
  types = typing.get_type_hints(cls)
  made = {}
  for key, value in values.items():
    check_key(prefix + key)
    kind = types[key]
    if dataclasses.is_dataclass(kind):
      made[key] = _build(kind, value, f'{prefix}{key}.')
    else:
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
    raise ValueError(f'{key}={value!r} must be of type {kind.__name__}.')
  if kind is float and not math.isfinite(value):
    raise ValueError(f'{key}={value!r} must be finite.')
  return value


def check_key(key: str) -> None:
  """ValueError, naming the nearest keys that exist, unless `key` is a setting or a section."""
  leaves = _leaves()
  if key in leaves or any(leaf.startswith(key + '.') for leaf in leaves):
    return
  last = key.rpartition('.')[2]
  near = difflib.get_close_matches(key, leaves, n=2, cutoff=0.6)
  near += [leaf for leaf in leaves if difflib.get_close_matches(last, [leaf.rpartition('.')[2]])]
  near = list(dict.fromkeys(near))[:3]
  hint = f'; did you mean {" or ".join("config." + name for name in near)}?' if near else '.'
  raise ValueError(f'config.{key} does not exist{hint}')


def _leaves(cls: type = Settings, prefix: str = '') -> list[str]:
  names = []
  for key, kind in typing.get_type_hints(cls).items():
    names += _leaves(kind, f'{prefix}{key}.') if dataclasses.is_dataclass(kind) else [prefix + key]
  return names


def validate(settings: Settings) -> None:
  """Checks the values against each other; ValueError names the key and the fix."""
  _stages(settings)
  _names(settings)
  _activations(settings)
  _ranges(settings)
  _lengths(settings)
  _batch_parts(settings)
  _packing(settings)
  conflicts.check(settings)


def spread(settings: Settings, granularity: str) -> str:
  """The way a segment's z is spread over its tokens, for that granularity."""
  name = settings.shaping.spread
  if name == 'auto':
    return 'bandit' if granularity == 'bandit' else 'even_split'
  return name


def _stages(s: Settings) -> None:
  if not s.stages:
    raise ValueError(f'config.stages is empty; name jobs out of {", ".join(JOBS)}.')
  for stage in s.stages:
    _one_of('stages', stage, JOBS)
  in_order = tuple(job for job in JOBS if job in s.stages)
  if s.stages != in_order:
    raise ValueError(f'config.stages={",".join(s.stages)} must be in order: {",".join(in_order)}.')
  if 'reward' in s.stages and s.reward_model.path:
    raise ValueError(
      f'config.reward_model.path={s.reward_model.path!r}, but config.stages trains a reward model; '
      "empty the path, or leave 'reward' out of config.stages."
    )


def _names(s: Settings) -> None:
  published = [f'published:{name}' for name in normalizer.PUBLISHED]
  for key, names in {
    'runtime.dtype': ('float32', 'bfloat16'),
    'runtime.weights_dtype': ('float32', 'bfloat16'),
    'runtime.frozen_memory': ('device', 'host'),
    'runtime.attention': ('auto', 'xla', 'cudnn', 'splash'),
    'data.overlong': ('truncate_left', 'drop', 'error'),
    'reward_model.normalizer': ('', 'none', *published),
    'normalizer.kind': ('auto', *normalizer.KINDS),
    'normalizer.weighting': normalizer.WEIGHTINGS,
    'shaping.spread': ('auto', *rewards.SPREADS),
    'shaping.redistribute': ('none', 'red'),
    'shaping.red_baseline': rewards.BASELINES,
    'shaping.end_penalty': rewards.END_PENALTIES,
    'shaping.length_penalty': rewards.LENGTH_PENALTIES,
    'ppo.kl_estimator': tuple(kl.ESTIMATORS),
    'ppo.kl_in': ('reward', 'loss'),
    'ppo.gae_over': ('token', 'segment'),
    'ppo.loss_mean': losses.MEANS,
  }.items():
    _one_of(key, _get(s, key), names)
  for section, empty in (('reward', ()), ('reward_model', ('',))):
    for name, names in {
      'granularity': segmentation.GRANULARITIES,
      'cut': segmentation.CUTS,
      'stop_token': ('outside', 'inside'),
      'aggregation': tuple(aggregation.AGGREGATIONS),
    }.items():
      key = f'{section}.segmentation.{name}'
      _one_of(key, _get(s, key), (*empty, *names))


def _activations(s: Settings) -> None:
  keep = [] if s.runtime.remat in ('none', 'full') else s.runtime.remat.split(',')
  offload = s.runtime.offload.split(',') if s.runtime.offload else []
  for key, names, others in (('remat', keep, 'none, full, or '), ('offload', offload, '')):
    for name in names:
      if name not in ACTIVATIONS:
        raise ValueError(
          f'config.runtime.{key}: {name!r} is no activation; use {others}names out of '
          f'{",".join(ACTIVATIONS)}, joined by commas.'
        )
  both = sorted(set(keep) & set(offload))
  if both:
    raise ValueError(
      f'config.runtime.remat and runtime.offload both name {", ".join(both)}; it is kept in one '
      'place, on the device or on the host.'
    )
  if offload and s.runtime.remat == 'none':
    raise ValueError(
      'config.runtime.offload with remat=none: everything is kept on the device; set '
      'config.runtime.remat=full, or names.'
    )


def _one_of(key: str, value: str, names: tuple[str, ...]) -> None:
  if value not in names:
    near = difflib.get_close_matches(value, names, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else '.'
    named = ', '.join(name or "''" for name in names)
    raise ValueError(f'config.{key}={value!r} is not one of {named}{hint}')


# Keys by the least value they may have. A learning rate of 0 is a way to see what does not learn.
_LEAST = {
  0: (
    *('data.limit', 'sft.steps', 'sft.micro_batch', 'evaluate.show'),
    *('checkpoint.every', 'checkpoint.minutes', 'checkpoint.max_misses', 'log_every'),
    *('reward.eval_every', 'ppo.eval_every', 'report.every', 'report.evaluated'),
    *('reward.steps', 'reward.micro_batch', 'reward.margin', 'reward.rating_margin'),
    'reward.calibration.target_segment_length',
    *('critic.warmup_steps', 'shaping.reward_clip'),
    *('rollout.temperature', 'rollout.top_k', 'rollout.slots', 'rollout.min_new_tokens'),
    *('sft.packed_length', 'reward.packed_length', 'ppo.packed_length'),
    *('ppo.micro_batch', 'ppo.score_batch', 'ppo.kl_coef', 'ppo.kl_target', 'ppo.gamma'),
    *('ppo.gae_lambda', 'ppo.clip_eps', 'ppo.clip_eps_high', 'ppo.value_clip_eps'),
    *('ppo.dual_clip', 'ppo.entropy_coef', 'ppo.max_kl', 'ppo.max_reward'),
  ),
  1: (
    *('max_bad_steps', 'data.max_length', 'data.max_prompt_length', 'runtime.logprob_chunk'),
    *('runtime.unroll', 'sft.batch', 'sft.epochs', 'reward.batch', 'reward.epochs'),
    *('rollout.samples', 'report.responses'),
    *('reward.segmentation.fixed_length', 'reward.segmentation.min_length'),
    *('reward.calibration.samples', 'reward.calibration.batch'),
    'reward.calibration.max_new_tokens',
    *('normalizer.batch', 'normalizer.pairs', 'normalizer.min_count', 'rollout.max_new_tokens'),
    *('ppo.steps', 'ppo.rollout_batch', 'ppo.minibatch', 'ppo.epochs', 'ppo.kl_horizon'),
    *('shaping.length_threshold', 'compat.micro_batch'),
    *('evaluate.batch', 'evaluate.samples', 'evaluate_reward.batch', 'answers.batch'),
    *('checkpoint.keep', 'demo.sft_rows', 'demo.pairs'),
  ),
}
_OPTIMIZERS = ('sft.optimizer', 'reward.optimizer', 'ppo.policy_optimizer', 'ppo.critic_optimizer')


def _ranges(s: Settings) -> None:
  for least, keys in _LEAST.items():
    for key in keys:
      if _get(s, key) < least:
        raise ValueError(f'config.{key}={_get(s, key)} must be at least {least}.')
  if not 0 <= s.reward.calibration.entropy_quantile < 1:
    raise ValueError(
      f'config.reward.calibration.entropy_quantile={s.reward.calibration.entropy_quantile} must be '
      'at least 0 (off) and below 1.'
    )
  if s.reward.segmentation.temperature <= 0:
    raise ValueError('config.reward.segmentation.temperature must be above 0.')
  if 0 < s.ppo.dual_clip <= 1:
    raise ValueError(f'config.ppo.dual_clip={s.ppo.dual_clip} must be above 1, or 0 for none.')
  if not 0 < s.reward.holdout < 1:
    raise ValueError(f'config.reward.holdout={s.reward.holdout} must lie between 0 and 1.')
  if not 0 <= s.ppo.holdout < 1:
    raise ValueError(f'config.ppo.holdout={s.ppo.holdout} must be at least 0 and below 1.')
  if not 0 < s.rollout.top_p <= 1:
    raise ValueError(f'config.rollout.top_p={s.rollout.top_p} must be above 0 and at most 1.')
  for key in _OPTIMIZERS:
    optimizer = _get(s, key)
    _one_of(f'{key}.moments_dtype', optimizer.moments_dtype, ('float32', 'bfloat16'))
    if optimizer.learning_rate < 0:
      raise ValueError(f'config.{key}.learning_rate={optimizer.learning_rate} is negative.')
    if not 0 <= optimizer.warmup_ratio <= 1:
      raise ValueError(f'config.{key}.warmup_ratio={optimizer.warmup_ratio} is not in 0 to 1.')


def _get(settings: Settings, key: str) -> Any:
  return functools.reduce(getattr, key.split('.'), settings)


def _lengths(s: Settings) -> None:
  if s.data.max_prompt_length >= s.data.max_length:
    raise ValueError(
      f'config.data.max_prompt_length={s.data.max_prompt_length} leaves no room for a response; '
      f'it must be less than config.data.max_length={s.data.max_length}.'
    )
  if s.rollout.min_new_tokens > s.rollout.max_new_tokens:
    raise ValueError(
      f'config.rollout.min_new_tokens={s.rollout.min_new_tokens} is more than '
      f'config.rollout.max_new_tokens={s.rollout.max_new_tokens}.'
    )
  if s.demo.min_clauses > s.demo.max_clauses or s.demo.min_clauses < 1:
    raise ValueError(
      f'config.demo.min_clauses={s.demo.min_clauses} must be from 1 to '
      f'config.demo.max_clauses={s.demo.max_clauses}.'
    )


def _packing(s: Settings) -> None:
  """Packed rows hold the longest sequence, and a micro-batch says how many there are at once."""
  longest = s.data.max_length, 'data.max_length'
  ppo = s.data.max_prompt_length + s.rollout.max_new_tokens
  for section, (size, what), least in (
    ('sft', longest, 1),
    ('reward', longest, 2),
    ('ppo', (ppo, 'data.max_prompt_length + rollout.max_new_tokens'), 1),
  ):
    width = _get(s, f'{section}.packed_length')
    if width and section in s.stages and width < size:
      raise ValueError(
        f'config.{section}.packed_length={width} is less than {what} = {size}: a sequence could be '
        f'longer than its row; use {size} or more.'
      )
    if width and _get(s, f'{section}.micro_batch') < least:
      raise ValueError(
        f'config.{section}.packed_length={width} needs config.{section}.micro_batch of at least '
        f'{least}: the packed rows that go through the network at once.'
      )


def _batch_parts(s: Settings) -> None:
  for whole_key, keys in (
    ('ppo.rollout_batch', ('ppo.minibatch', 'ppo.score_batch', 'rollout.samples')),
    ('ppo.minibatch', ('ppo.micro_batch',)),
    ('reward.batch', ('reward.micro_batch',)),
    ('sft.batch', ('sft.micro_batch',)),
  ):
    whole = _get(s, whole_key)
    for key in keys:
      size = _get(s, key)
      if size and whole % size:
        below = max(d for d in range(1, size + 1) if whole % d == 0)
        raise ValueError(
          f'config.{whole_key}={whole} is not divisible by config.{key}={size}; use {key}={below} '
          f'or {whole_key}={-(-whole // size) * size}.'
        )
