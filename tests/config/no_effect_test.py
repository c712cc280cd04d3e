"""Settings under which a stage would train for nothing."""

import pytest

from segjax.config import parse, presets
from segjax.config.no_effect import check_learning_rate, frozen_networks
from segjax.config.settings import Optimizer
from segjax.errors import UserError


def _settings(stages, **values):
  config = presets.default_config()
  config.stages = stages
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in values.items()})
  return parse.from_config(config)


PAIRS = {'rollout__samples_per_prompt': 2}


@pytest.mark.parametrize(
  'stage, values, message',
  [
    (
      'ppo',
      {'critic__warmup_rollouts': 5, 'ppo__max_steps': 2},
      'config.critic.warmup_rollouts=5 leaves none of config.ppo.max_steps=2 for the policy',
    ),
    ('ppo', {'critic__warmup_rollouts': 2, 'ppo__max_steps': 2}, 'warmup_rollouts=2 leaves none'),
    (
      'ppo',
      {'ppo__max_steps': 1, 'ppo__minibatch_size': 1024},
      r'config.ppo.policy_optimizer.warmup_ratio=0.03 leaves a run of one update',
    ),
    (
      'ppo',
      {'critic__warmup_rollouts': 1, 'ppo__max_steps': 2, 'ppo__minibatch_size': 1024},
      'config.ppo.policy_optimizer.warmup_ratio=0.03',
    ),
    (
      'ppo',
      {'ppo__policy_optimizer__learning_rate': 0.0, 'ppo__critic_optimizer__learning_rate': 0.0},
      'config.ppo.policy_optimizer.learning_rate=0 changes no weight',
    ),
    (
      'ppo',
      {
        'reward_shaping__reward_model_weight': 0.0,
        'reward_shaping__reward_fn': 'a:b',
        'reward_shaping__reward_fn_weight': 0.0,
      },
      'are both 0, which leaves no reward',
    ),
    (
      'ppo',
      {'ppo__estimator': 'rloo', 'critic__warmup_rollouts': 1, **PAIRS},
      'config.critic.warmup_rollouts=1 has no effect with ppo.estimator=rloo, which has no critic;',
    ),
    (
      'ppo',
      {'ppo__estimator': 'dr_grpo', 'ppo__gae_level': 'border', **PAIRS},
      "ppo.gae_level=border has no effect .* set it to 'token', or config.ppo.estimator=gae.",
    ),
    (
      'ppo',
      {'ppo__estimator': 'reinforce_plus_plus', 'lora__critic__rank': 8},
      'config.lora.critic.rank=8 has no effect',
    ),
    (
      'ppo',
      {'ppo__estimator': 'rloo', 'ppo__policy_optimizer__learning_rate': 0.0, **PAIRS},
      'config.ppo.policy_optimizer.learning_rate=0 changes no weight',
    ),
    ('sft', {'rollout__carry': True}, "rollout.carry=True has no effect without 'ppo'"),
    ('sft', {'sft__max_steps': 1}, 'config.sft.optimizer.warmup_ratio=0.03 leaves'),
    (
      'sft',
      {'sft__max_steps': 9, 'sft__optimizer__learning_rate': 0.0},
      'config.sft.optimizer.learning_rate=0 changes no weight',
    ),
    (
      'sft',
      {'sft__max_steps': 9, 'sft__optimizer__learning_rate': 1e-50},
      'config.sft.optimizer.learning_rate=1e-50 changes no weight',
    ),
    ('reward', {'reward__max_steps': 1}, 'config.reward.optimizer.warmup_ratio=0.03 leaves'),
    ('sft', {'sft__optimizer__beta1': 1.0}, 'beta1=1.0 must be at least 0 and below 1'),
    ('sft', {'sft__optimizer__beta2': 1.0}, 'beta2=1.0 must be at least 0 and below 1'),
    ('sft', {'sft__optimizer__epsilon': 0.0}, 'epsilon=0.0 must be above 0'),
    ('sft', {'sft__optimizer__min_lr_ratio': 2.0}, 'min_lr_ratio=2.0 must be from 0 to 1'),
    ('sft', {'sft__optimizer__weight_decay': -1.0}, 'weight_decay=-1.0 must be at least 0'),
  ],
)
def test_a_stage_that_would_change_nothing_is_refused(stage, values, message):
  with pytest.raises(UserError, match=message):
    _settings((stage,), **values)


def test_settings_of_other_stages_do_not_count():
  _settings(('sft',), critic__warmup_rollouts=99, reward__max_steps=1)


def test_a_schedule_whose_first_update_alone_has_rate_0_stays():
  check_learning_rate(Optimizer(), 2, 'k')
  check_learning_rate(Optimizer(warmup_ratio=0.0), 1, 'k')
  check_learning_rate(Optimizer(warmup_ratio=1.0), 2, 'k')


def test_one_network_of_ppo_may_be_frozen():
  policy, critic = ('ppo__policy_optimizer__learning_rate', 'ppo__critic_optimizer__learning_rate')
  assert frozen_networks(_settings(('ppo',), **{policy: 0.0})) == ['policy']
  assert frozen_networks(_settings(('ppo',), **{critic: 0.0})) == ['critic']
