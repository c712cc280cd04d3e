"""Array mathematics of the method: pure functions that jit, one sequence [T] at a time.

This list is the public interface; other names of the modules may change. vmap where a shape says
[T].
Values in `segjax.types`: `Segments`, `Normalizer`.
"""

from segjax.rl.advantages import (
  action_starts,
  border_gae,
  gae,
  length_adaptive_lambda,
  macro_gae,
)

# `segjax.rl.advantages` is the module.
from segjax.rl.advantages import returns as lambda_returns
from segjax.rl.aggregation import AGGREGATIONS, sequence_score
from segjax.rl.critic_free import (
  dr_grpo,
  group_norm,
  leave_one_out,
  reinforce_plus_plus,
  return_to_go,
)
from segjax.rl.cuts import CUTS
from segjax.rl.huber import huber_fit, r_squared
from segjax.rl.kl import ESTIMATORS, adaptive_kl_coef, k1, k2, k3
from segjax.rl.learned_tokens import high_entropy_tokens
from segjax.rl.lm_rewards import KINDS as LM_REWARDS
from segjax.rl.lm_rewards import implicit_reward, pool, token_reward
from segjax.rl.logprobs import logprob_and_entropy
from segjax.rl.losses import (
  batch_mean,
  bradley_terry,
  cross_entropy,
  num_terms,
  policy_loss,
  value_loss,
)
from segjax.rl.masked import masked_mean, masked_sum, whiten
from segjax.rl.normalizer import (
  PUBLISHED,
  bin_moments,
  fit_constant,
  fit_quality,
  fit_regression,
  mean_std,
  normalize,
  relative_position,
)
from segjax.rl.pair_metrics import preference_metrics
from segjax.rl.rewards import end_penalty, length_penalty, red, shaped_reward
from segjax.rl.segmentation import (
  content_mask,
  segment,
  segment_at,
)
from segjax.rl.spreads import (
  SPREADS,
  bandit,
  dense_reward,
  end_only,
  entropy_weighted,
  even_split,
  min_credit,
  repeat,
)
from segjax.rl.threshold import threshold_curve, threshold_for_length, threshold_for_quantile

__all__ = [
  'AGGREGATIONS',
  'CUTS',
  'ESTIMATORS',
  'LM_REWARDS',
  'PUBLISHED',
  'SPREADS',
  'action_starts',
  'adaptive_kl_coef',
  'bandit',
  'batch_mean',
  'bin_moments',
  'border_gae',
  'bradley_terry',
  'content_mask',
  'cross_entropy',
  'dense_reward',
  'dr_grpo',
  'end_only',
  'end_penalty',
  'entropy_weighted',
  'even_split',
  'fit_constant',
  'fit_quality',
  'fit_regression',
  'gae',
  'group_norm',
  'high_entropy_tokens',
  'huber_fit',
  'implicit_reward',
  'k1',
  'k2',
  'k3',
  'lambda_returns',
  'leave_one_out',
  'length_adaptive_lambda',
  'length_penalty',
  'logprob_and_entropy',
  'macro_gae',
  'masked_mean',
  'masked_sum',
  'mean_std',
  'min_credit',
  'normalize',
  'num_terms',
  'policy_loss',
  'pool',
  'preference_metrics',
  'r_squared',
  'red',
  'reinforce_plus_plus',
  'relative_position',
  'repeat',
  'return_to_go',
  'segment',
  'segment_at',
  'sequence_score',
  'shaped_reward',
  'threshold_curve',
  'threshold_for_length',
  'threshold_for_quantile',
  'token_reward',
  'value_loss',
  'whiten',
]
