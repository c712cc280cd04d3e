"""Checks for settings under which a stage trains for nothing; each message gives the fix."""

from operator import attrgetter

from segjax.config.reward_lines import parse_rewards
from segjax.config.settings import Optimizer, Settings
from segjax.errors import UserError

_SMALLEST = 1e-37  # smaller rates are 0 in float32


def check_no_effect(s: Settings) -> None:
  """Raises UserError if a stage would leave its weights as they are, or carry no response."""
  for name in ('sft', 'reward', 'dpo'):
    section = getattr(s, name)
    if name in s.stages and section.max_steps:
      check_learning_rate(section.optimizer, section.max_steps, f'{name}.optimizer')
  if 'ppo' in s.stages:
    _check_ppo(s)
  elif s.rollout.carry:
    raise UserError(
      "config.rollout.carry=True has no effect without 'ppo' in config.stages: other stages wait "
      'for all responses; set it to False.'
    )


def check_learning_rate(optimizer: Optimizer, num_updates: int, key: str) -> None:
  """Raises UserError if the learning rate is 0 in every update.

  Args:
    optimizer: settings of the optimizer.
    num_updates: updates of the run.
    key: the config key of `optimizer`.
  """
  if optimizer.learning_rate < _SMALLEST:
    raise UserError(
      f'config.{key}.learning_rate={optimizer.learning_rate:g} changes no weight; make it larger.'
    )
  # The rate of the first update is 0: it rises from there.
  if num_updates == 1 and optimizer.warmup_ratio:
    raise UserError(
      f'config.{key}.warmup_ratio={optimizer.warmup_ratio:g} leaves a run of one update at a '
      'learning rate of 0; set it to 0, or train for more steps.'
    )


def frozen_networks(s: Settings) -> list[str]:
  """Returns the networks that PPO would train, but for a learning rate of 0."""
  optimizers = {'policy': s.ppo.policy_optimizer}
  if s.ppo.has_critic:
    optimizers['critic'] = s.ppo.critic_optimizer
  return [name for name, value in optimizers.items() if value.learning_rate < _SMALLEST]


def _check_ppo(s: Settings) -> None:
  if not s.ppo.has_critic:
    _check_no_critic(s)
  steps = s.ppo.max_steps - s.critic.warmup_rollouts
  if steps <= 0:
    raise UserError(
      f'config.critic.warmup_rollouts={s.critic.warmup_rollouts} leaves none of '
      f'config.ppo.max_steps={s.ppo.max_steps} for the policy; make it smaller.'
    )
  frozen = frozen_networks(s)
  if frozen != ['policy'] or not s.ppo.has_critic:  # it alone may be frozen, to train a critic
    per_step = s.ppo.num_ppo_epochs * (s.ppo.rollout_batch_size // s.ppo.minibatch_size)
    check_learning_rate(s.ppo.policy_optimizer, steps * per_step, 'ppo.policy_optimizer')
  weights = [s.reward_shaping.reward_model_weight, s.reward_shaping.reward_fn_weight]
  weights += [line.weight for line in parse_rewards(s.rewards)]
  if not any(weights) and s.reward_shaping.lm_reward.kind == 'off':
    raise UserError(
      'config.reward_shaping.reward_model_weight and reward_shaping.reward_fn_weight are both 0, '
      'which leaves no reward; set one of them, or a weight in config.rewards.'
    )


def _check_no_critic(s: Settings) -> None:
  """Raises UserError if what only a critic reads is set.

  Presets set learning rates, gae_lambda and value_clip_eps, which may therefore stay.
  """
  defaults = Settings()
  keys = ['ppo.gae_level', 'ppo.lambda_length_factor', 'ppo.value_gae_lambda']
  keys += [f'critic.{name}' for name in vars(defaults.critic)]
  keys += [f'lora.critic.{name}' for name in vars(defaults.lora.critic)]
  for key in keys:
    value, default = attrgetter(key)(s), attrgetter(key)(defaults)
    if value != default:
      raise UserError(
        f'config.{key}={value} has no effect with ppo.estimator={s.ppo.estimator}, which has no '
        f'critic; set it to {default!r}, or config.ppo.estimator=gae.'
      )
