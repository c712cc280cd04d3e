"""Checks the values of the settings: each by its choices and range, and sizes against each other.

Settings that contradict each other are refused by `conflicts`. Each message gives the key and the
fix.
"""

import datetime
from operator import attrgetter

from segjax.config import conflicts, lora, no_effect, renamed, reward_lines
from segjax.config.choices import ACTIVATIONS, CHOICES, MINIMUMS, OPTIMIZERS
from segjax.config.field_checks import check_choice, check_minimum
from segjax.config.settings import Settings, replace
from segjax.errors import UserError

# What goes through the networks at once, by the batch that it divides.
_AT_ONCE = {
  'ppo.rollout_batch_size': ('ppo.scoring_batch_size',),
  'ppo.minibatch_size': ('ppo.micro_batch_size',),
  'reward.batch_size': ('reward.micro_batch_size',),
  'dpo.batch_size': ('dpo.micro_batch_size',),
  'sft.batch_size': ('sft.micro_batch_size',),
}


def validate(settings: Settings) -> None:
  """Checks the values; UserError gives the key and the fix."""
  _check_reward_model(settings)
  _check_choices(settings)
  _check_activations(settings)
  _check_ranges(settings)
  _check_date(settings)
  _check_lengths(settings)
  _check_divisibility(settings)
  _check_packing(settings)
  renamed.check_metric(settings.checkpoint.best_metric, 'config.checkpoint.best_metric=')
  lora.check_lora(settings)
  reward_lines.check_rewards(settings)
  conflicts.check_conflicts(settings)
  no_effect.check_no_effect(settings)


def resolve_spread(settings: Settings, granularity: str, name: str = '') -> str:
  """Returns the name in `rl.spreads.SPREADS` by which z is spread, for a granularity.

  Args:
    settings: of the run.
    granularity: of the segments.
    name: of a reward model's own spread; '' for that of the settings.
  """
  name = name or settings.reward_shaping.spread
  if name == 'auto':
    return 'bandit' if granularity == 'bandit' else 'even_split'
  return name


def resolve_recompute_logprob(settings: Settings) -> bool:
  """Returns rollout.recompute_logprob; by default, whether rollouts are in bfloat16 or int8."""
  rollout = settings.rollout
  if rollout.recompute_logprob is not None:
    return rollout.recompute_logprob
  return settings.runtime.compute_dtype == 'bfloat16' or rollout.weights_dtype == 'int8'


def _check_reward_model(s: Settings) -> None:
  if 'reward' in s.stages and s.reward_model.path:
    raise UserError(
      f'config.reward_model.path={s.reward_model.path!r}, but config.stages trains a reward model; '
      "empty the path, or leave 'reward' out of config.stages."
    )


def _check_choices(s: Settings) -> None:
  for key, names in CHOICES.items():
    value = attrgetter(key)(s)
    if value is not None:
      check_choice(f'config.{key}', value, names)


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
          f'config.runtime.{key}: {name!r} is not an activation; use {others}names out of '
          f'{",".join(ACTIVATIONS)}, joined by commas.'
        )
  both = sorted(set(keep) & set(offload))
  if both:
    raise UserError(
      f'config.runtime.remat and runtime.offload_activations both name {", ".join(both)}; an '
      'activation is kept on the device or on the host, so remove it from one of them.'
    )
  if offload and s.runtime.remat == 'none':
    raise UserError(
      'config.runtime.offload_activations has no effect with remat=none, which keeps everything on '
      'the device; set '
      'config.runtime.remat=full, or names.'
    )


def _check_ranges(s: Settings) -> None:
  for key, minimum in MINIMUMS.items():
    value = attrgetter(key)(s)
    if value is not None:
      check_minimum(f'config.{key}', value, minimum)
  if s.seed >= 1 << 32:  # jax reads 32 bits
    raise UserError(f'config.seed={s.seed} must be below {1 << 32}.')
  quantile = s.reward.threshold_search.entropy_quantile
  if not 0 <= quantile < 1:
    raise UserError(
      f'config.reward.threshold_search.entropy_quantile={quantile} must be at least 0 (off) and '
      'below 1.'
    )
  for section in ('reward', 'reward_model'):
    segmentation, key = getattr(s, section).segmentation, f'config.{section}.segmentation'
    temperature = segmentation.softmax_temperature
    if temperature is not None and temperature <= 0:
      raise UserError(f'{key}.softmax_temperature={temperature} must be above 0.')
    probability = segmentation.probability_threshold
    if probability is not None and not 0 < probability <= 1:
      raise UserError(f'{key}.probability_threshold={probability} must be above 0 and at most 1.')
  if s.reward_shaping.credit_temperature <= 0:
    raise UserError(
      f'config.reward_shaping.credit_temperature={s.reward_shaping.credit_temperature} must be '
      'above 0.'
    )
  if 0 < s.ppo.dual_clip_ratio <= 1:
    raise UserError(
      f'config.ppo.dual_clip_ratio={s.ppo.dual_clip_ratio} must be above 1, or 0 for none.'
    )
  if s.ppo.importance_clip and s.ppo.importance_clip < 1:  # would scale down tokens of weight 1
    raise UserError(
      f'config.ppo.importance_clip={s.ppo.importance_clip} must be at least 1, or 0 for no weights.'
    )
  for section in ('reward', 'dpo'):
    fraction = getattr(s, section).holdout_fraction
    if not 0 < fraction < 1:
      raise UserError(f'config.{section}.holdout_fraction={fraction} must be between 0 and 1.')
    # At 1/2 both orders of a pair are as good, and beyond it the rejected response is preferred.
    smoothing = getattr(s, section).label_smoothing
    if smoothing >= 0.5:
      raise UserError(f'config.{section}.label_smoothing={smoothing} must be below 0.5.')
  if s.dpo.beta <= 0:
    raise UserError(f'config.dpo.beta={s.dpo.beta} must be above 0.')
  for section in ('sft', 'ppo'):
    fraction = getattr(s, section).holdout_fraction
    if not 0 <= fraction < 1:
      raise UserError(
        f'config.{section}.holdout_fraction={fraction} must be at least 0 and below 1.'
      )
  if not 0 <= s.reward_shaping.attention_share <= 1:
    raise UserError(
      f'config.reward_shaping.attention_share={s.reward_shaping.attention_share} must be from 0 '
      'to 1.'
    )
  if not 0 < s.rollout.top_p <= 1:
    raise UserError(f'config.rollout.top_p={s.rollout.top_p} must be above 0 and at most 1.')
  _check_shares(s)


def _check_shares(s: Settings) -> None:
  ratios = [f'{key}.{name}' for key in OPTIMIZERS for name in ('warmup_ratio', 'min_lr_ratio')]
  for key in ('ppo.gamma', 'ppo.gae_lambda', 'ppo.value_gae_lambda', *ratios):
    value = attrgetter(key)(s)
    if value is not None and not 0 <= value <= 1:
      raise UserError(f'config.{key}={value} must be from 0 to 1.')
  if not 0 < s.ppo.learn_share <= 1:
    raise UserError(f'config.ppo.learn_share={s.ppo.learn_share} must be above 0 and at most 1.')
  for key in (f'{key}.{name}' for key in OPTIMIZERS for name in ('beta1', 'beta2')):
    value = attrgetter(key)(s)
    if not 0 <= value < 1:
      raise UserError(f'config.{key}={value} must be at least 0 and below 1.')
  for key in OPTIMIZERS:
    # With 0, a weight without a gradient moves by 0 / 0.
    if (epsilon := attrgetter(key)(s).epsilon) <= 0:
      raise UserError(f'config.{key}.epsilon={epsilon} must be above 0.')


def _check_date(s: Settings) -> None:
  try:
    datetime.datetime.fromisoformat(s.data.template_date or '2024-07-26')
  except ValueError as error:
    raise UserError(
      f'config.data.template_date={s.data.template_date!r} is not an ISO date; use one such as '
      '2024-07-26.'
    ) from error


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


def longest_sequence(s: Settings, section: str) -> tuple[int, str]:
  """Returns the most tokens of a sequence in a training job, and the keys that say so."""
  if section != 'ppo':
    return s.data.max_length, 'data.max_length'
  longest = s.data.max_prompt_length + s.rollout.max_new_tokens
  return longest, 'data.max_prompt_length + rollout.max_new_tokens'


def _check_packing(s: Settings) -> None:
  """Checks that packed rows hold the longest sequence, and how many go through at once."""
  for section, minimum in (('sft', 1), ('reward', 2), ('dpo', 2), ('ppo', 1)):
    size, what = longest_sequence(s, section)
    settings = getattr(s, section)
    width, rows, tokens = (
      settings.packing_length,
      settings.micro_batch_size,
      settings.micro_batch_tokens,
    )
    if rows and tokens:
      raise UserError(
        f'config.{section}.micro_batch_size={rows} and {section}.micro_batch_tokens={tokens} both '
        'say what goes through the network at once; set one of them to 0.'
      )
    if width and section in s.stages and width < size:
      raise UserError(
        f'config.{section}.packing_length={width} is less than {what} = {size}: a sequence could '
        f'be longer than its row; use {size} or more.'
      )
    if width and not tokens and rows < minimum:
      raise UserError(
        f'config.{section}.packing_length={width} needs config.{section}.micro_batch_tokens, or '
        f'micro_batch_size of at least {minimum}: what goes through the network at once.'
      )


def limit_to_batches(s: Settings) -> Settings:
  """Returns the settings with no more rows at once than the batch has."""
  for total_key, keys in _AT_ONCE.items():
    sizes = {key: min(attrgetter(key)(s), attrgetter(total_key)(s)) for key in keys}
    s = replace(s, **sizes)
  return s


def _check_divisibility(s: Settings) -> None:
  parts = {'ppo.rollout_batch_size': ('ppo.minibatch_size', 'rollout.samples_per_prompt')}
  for total_key, keys in (*parts.items(), *_AT_ONCE.items()):
    total = attrgetter(total_key)(s)
    for key in keys:
      size = attrgetter(key)(s)
      if size and total % size:
        below = max(d for d in range(1, size + 1) if total % d == 0)
        raise UserError(
          f'config.{total_key}={total} is not divisible by config.{key}={size}; use {key}={below} '
          f'or {total_key}={-(-total // size) * size}.'
        )
