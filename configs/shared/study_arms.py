"""The arms of the shipped studies, and the constants that each arm tunes.

A line adds an arm: 'NAME KEY=VALUE KEY=VALUE ...', what it changes of the demo's settings.
"""

# Yardsticks: the gold reward as PPO's reward, and the best of n responses of the SFT model.
YARDSTICKS = (
  'gold reward_shaping.reward_fn={gold} reward_shaping.reward_model_weight=0',
  'best_of_n stages=evaluate evaluate.samples_per_prompt=64',
)
ARMS = {
  'granularity': (
    'segment',
    'token reward.segmentation.granularity=token',
    'bandit reward.segmentation.granularity=bandit',
    # Controls. A full stop ends a clause of the built-in languages: these are the true boundaries.
    'sentence reward.segmentation.boundary=delimiter',
    'shuffled_cuts reward.segmentation.boundary=shuffled_entropy',
    # As long as a clause on average.
    'fixed_length reward.segmentation.boundary=fixed_length reward.segmentation.segment_length=5',
    *YARDSTICKS,
  ),
  'normalizer': (
    'regression',
    'none normalizer.kind=none',
    'global normalizer.kind=global',
    'last normalizer.kind=last',
    'scalar normalizer.kind=scalar',
  ),
  'spread': (
    'even_split',
    'end_only reward_shaping.spread=end_only',
    'repeat reward_shaping.spread=repeat',
    'entropy_weighted reward_shaping.spread=entropy_weighted',
    'min_credit reward_shaping.credit=min',
  ),
  'threshold': tuple(
    f'threshold_{threshold} reward.segmentation.entropy_threshold={threshold}'
    for threshold in (1.0, 0.25, 0.5, 1.5, 2.0, 2.5, 3.0)
  ),
  # The score of an ordinary reward model, which judges whole responses, divided over segments.
  'redistribution': (
    'segment',
    *(
      f'{how} reward.segmentation.granularity=bandit normalizer.kind=scalar '
      f'reward_model.segmentation.granularity=segment reward_shaping.redistribute={how}'
      for how in ('red', 'gradient', 'attention')
    ),
  ),
  'estimator': (
    'gae_token',
    'gae_segment ppo.gae_level=segment',
    'gae_border ppo.gae_level=border',
    # Decoupled and length-adaptive λ.
    'gae_adaptive ppo.lambda_length_factor=0.05 ppo.value_gae_lambda=1.0',
    'rloo ppo.estimator=rloo rollout.samples_per_prompt=8',
    # As published: the group is the only scale of the advantages, and KL is a term of the loss.
    *(
      f'{name} ppo.estimator={name} rollout.samples_per_prompt=8 ppo.whiten=False '
      'ppo.kl_placement=loss ppo.kl_estimator=k3'
      for name in ('group_norm', 'dr_grpo')
    ),
    'reinforce_plus_plus ppo.estimator=reinforce_plus_plus',
    'learn_on_entropy ppo.learn_on=high_ref_entropy',
    'learn_on_starts ppo.learn_on=segment_starts',
  ),
}
# Each study begins with the same arm, under a name of its own.
ARMS['all'] = (*ARMS['granularity'], *(line for name in list(ARMS)[1:] for line in ARMS[name][1:]))

# The scale of the rewards differs between arms, so the factor of KL has the widest range.
GRID = (
  'ppo.policy_optimizer.learning_rate=1e-3|2e-3',
  'ppo.kl_coef=0.05|0.15|0.45|1.35',
  'ppo.clip_eps=0.1|0.2',
)
