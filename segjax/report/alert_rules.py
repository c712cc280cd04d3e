"""The rules of alerts: what smoothed metrics say is going wrong in a run, and the remedy.

A rule reads the first, the recent and the best level of its metrics, not their curves, so memory
does not grow with the number of steps. The thresholds come from practice with language models of
1 to 70 B parameters.
"""

import dataclasses
import math
from collections.abc import Callable

_FIRST = 5  # values whose mean is the level at the start
_SMOOTH = 0.2  # weight of the newest value in the recent level
_MIN_VALUES = 10  # of each metric before a rule may hold
_MIN_EVALUATIONS = 4  # the same for metrics of evaluation, which are rarer


@dataclasses.dataclass
class MetricTrend:
  """A metric: the mean of its first values, the exponential mean, and the highest of that."""

  count: int = 0
  first: float = 0.0
  recent: float = 0.0
  best: float = -math.inf

  def add(self, value: float) -> None:
    """Adds the next value."""
    self.count += 1
    if self.count <= _FIRST:
      self.first += (value - self.first) / self.count
    weight = max(_SMOOTH, 1 / self.count)  # the first values weigh the same
    self.recent += weight * (value - self.recent)
    self.best = max(self.best, self.recent)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A condition on metrics and the alert to log when it holds.

  Attributes:
    metrics: names of the metrics it reads.
    holds: the condition, a function of their trends in that order.
    text: the alert; {0}, {1} are replaced by the metrics' recent levels.
    after: number of values of each metric before the condition is checked.
  """

  metrics: tuple[str, ...]
  holds: Callable[..., bool]
  text: str
  after: int = _MIN_VALUES


def _fell_from_best(held_out: MetricTrend) -> bool:
  """Returns whether a metric has lost more than a quarter of its gain since the start."""
  gained = held_out.best - held_out.first
  return gained > 0 and held_out.best - held_out.recent > 0.25 * gained + 1e-6


def _critic_fails(variance: MetricTrend) -> bool:
  """Returns whether the critic gets worse than a constant, or is still no better after a while."""
  is_slow = variance.count >= 20 and variance.recent < 0.05
  return is_slow or variance.recent < min(variance.first, 0) - 0.5


def _overfits(accuracy: MetricTrend, held_out: MetricTrend) -> bool:
  """Returns whether held-out accuracy falls, beyond its noise, and that in training rises."""
  lost = held_out.best - held_out.recent
  return accuracy.recent > accuracy.first and lost > 0.03 and _fell_from_best(held_out)


_TOO_MANY_SEGMENTS = (
  'most segments are a single token: {1:.1f} of the {0:.1f} of a response. Raise'
  ' segmentation.entropy_threshold, or let reward.threshold_search choose it'
)
_ONE_SEGMENT = (
  'responses are one segment, {0:.1f} each: the reward is not dense. Lower'
  ' segmentation.entropy_threshold, or let reward.threshold_search choose it'
)

RULES = (
  Rule(
    ('objective/kl', 'response/length_mean'),
    lambda kl, length: kl.recent > 0.75 * max(length.recent, 1),
    'KL is high, {0:.1f} nats per response of {1:.0f} tokens: the policy is far from the reference.'
    ' Raise ppo.kl_coef, set ppo.kl_target, or lower ppo.policy_optimizer.learning_rate',
    after=3,
  ),
  Rule(
    ('policy/entropy',),
    lambda entropy: entropy.recent < 0.25 * entropy.first,
    'entropy is collapsing, {0:.2f} nats per token: responses become alike. Raise ppo.kl_coef, or'
    ' set ppo.entropy_coef to a small value such as 0.001',
  ),
  Rule(
    ('objective/kl',),
    lambda kl: kl.recent < -0.5,
    'KL is negative, {0:.2f} nats per response: the policy sampled is not the one that is trained.'
    ' Run configs/selfcheck.py, and set rollout.temperature=1, top_p=1 and top_k=0',
    after=5,
  ),
  Rule(
    ('objective/kl', 'policy/grad_norm'),  # the second has no values while only the critic learns
    lambda kl, _: abs(kl.recent) < 1e-4,
    'the policy has not moved from the reference, KL {0:.0e} nats per response. Raise'
    ' ppo.policy_optimizer.learning_rate; with bfloat16 weights, whose small updates round to 0,'
    ' set runtime.param_dtype=float32',
  ),
  Rule(
    ('policy/grad_norm',),
    lambda norm: norm.recent < 1e-6,
    'the gradient of the policy is zero, {0:.0e}: nothing is learned. All advantages may be equal;'
    ' check objective/reward_std',
    after=3,
  ),
  Rule(
    ('response/eos_rate',),
    lambda rate: rate.recent < 0.5,
    'only {0:.0%} of the responses end with a stop token, the others are cut off. Raise'
    ' rollout.max_new_tokens; if they never end, train the SFT model on answers that end in the'
    ' stop token of its chat template, or set reward_shaping.missing_eos_penalty=at_eos',
    after=1,
  ),
  Rule(
    ('response/eos_rate',),
    lambda rate: rate.recent < rate.first - 0.2,
    'fewer responses end with a stop token, {0:.0%}. Raise rollout.max_new_tokens, or set '
    'reward_shaping.missing_eos_penalty=at_eos',
  ),
  Rule(
    ('response/length_mean',),
    lambda length: length.recent > 2 * length.first + 8,
    'responses are {0:.0f} tokens long, twice those at the start: check whether they are better or'
    ' only longer. Try reward_shaping.length_penalty=linear or a higher ppo.kl_coef',
  ),
  Rule(
    ('response/length_mean',),
    lambda length: length.recent < 0.4 * length.first - 2,
    'responses have shrunk to {0:.0f} tokens: check whether they still answer. Raise ppo.kl_coef,'
    ' or check whether the reward favours short responses',
  ),
  Rule(
    ('segments/per_response',),
    lambda count: count.recent < 0.5,
    'most responses are empty, {0:.2f} segments each: they earn nothing. Set'
    ' rollout.min_new_tokens, or check the chat template and the SFT model',
    after=1,
  ),
  Rule(
    ('segments/per_response', 'segments/one_token'),
    lambda count, one_token: one_token.recent > 0.7 * count.recent > 0.7,
    _TOO_MANY_SEGMENTS + '; a reward model that exists keeps the threshold of its training',
    after=1,
  ),
  Rule(
    ('segments/per_response', 'segments/one_token', 'response/length_mean'),
    lambda count, _, length: 0.5 < count.recent < 1.05 and length.recent >= 8,
    _ONE_SEGMENT + '; a reward model that exists keeps the threshold of its training',
    after=1,
  ),
  Rule(
    ('objective/reward_std', 'objective/reward'),
    lambda std, reward: std.recent <= 1e-6 + 1e-4 * abs(reward.recent),
    'all responses earn the same reward, {1:.3g}: there is nothing to learn. Check the reward'
    ' model, or reward_shaping.reward_fn',
    after=3,
  ),
  Rule(
    ('objective/reward', 'objective/reward_std'),
    lambda reward, std: reward.recent < reward.first - 1.5 * std.first - 1e-6,
    'the reward has fallen to {0:.3g}, by more than its standard deviation. Lower'
    ' ppo.policy_optimizer.learning_rate, or ppo.kl_coef if KL is near 0',
  ),
  Rule(
    ('reward/clipped',),
    lambda share: share.recent > 0.2,
    '{0:.0%} of the rewards are clipped at reward_shaping.reward_clip, which makes them equal.'
    ' Raise it, lower reward_fn_weight or reward_model_weight, or fit the normaliser again',
    after=1,
  ),
  Rule(
    ('critic/explained_variance',),
    _critic_fails,
    'the critic predicts the returns no better than a constant, explained variance {0:.2f}. Set'
    ' critic.warmup_rollouts, critic.init=reward_model, or raise'
    ' ppo.critic_optimizer.learning_rate; if it falls far below 0 during training, lower that',
    after=8,
  ),
  Rule(
    ('policy/clipfrac',),
    lambda share: share.recent > 0.3,
    '{0:.0%} of the tokens are clipped: updates are too large. Lower'
    ' ppo.policy_optimizer.learning_rate or ppo.num_ppo_epochs',
    after=3,
  ),
  Rule(
    ('policy/initial_ratio_deviation',),
    lambda deviation: deviation.recent > 0.5,
    'before any update the ratio of a token deviates from 1 by {0:.2f}: log-probs of sampling and'
    ' training disagree. Leave rollout.recompute_logprob at None, and in bfloat16 set'
    ' ppo.packing_length, whose rows round alike; configs/selfcheck.py checks the rest',
    after=3,
  ),
  Rule(
    ('rollout/logprob_mismatch',),
    lambda mismatch: mismatch.recent > 0.2,
    'responses are sampled from another distribution than the one trained, {0:.2f} nats per token:'
    ' use rollout.temperature=1, top_p=1 and top_k=0 for unbiased updates, or ppo.importance_clip',
    after=3,
  ),
  Rule(
    ('rollout/age_max',),
    lambda age: age.recent > 2 * age.first + 2,
    'responses are carried for longer, up to {0:.0f} steps, so that old policies drew their first'
    ' tokens. Lower rollout.max_new_tokens or rollout.max_concurrent, or set rollout.carry=False',
  ),
  *(
    Rule(
      ('objective/reward', held_out),
      lambda reward, held_out: reward.recent > reward.first and _fell_from_best(held_out),
      f'reward rises while {held_out} falls, {{1:.3f}}: the reward model is being exploited. Stop'
      ' at the best checkpoint (checkpoint.best_metric), raise ppo.kl_coef, or train the reward'
      ' model on responses of this policy',
      after=_MIN_EVALUATIONS,
    )
    for held_out in ('eval/reward', 'eval/gold')
  ),
  *(
    Rule(
      (name,),
      lambda loss: loss.recent > 1.5 * loss.first + 0.1,
      'the loss has risen to {0:.2f}. Lower the learning rate, or raise warmup_ratio',
    )
    for name in ('sft/loss', 'reward_model/loss', 'dpo/loss')
  ),
  Rule(
    ('reward_model/segments', 'reward_model/one_token_segments'),
    lambda count, one_token: one_token.recent > 0.7 * count.recent > 0.7,
    _TOO_MANY_SEGMENTS,
    after=1,
  ),
  Rule(
    ('reward_model/segments', 'reward_model/one_token_segments'),
    lambda count, _: 0.5 < count.recent < 1.05,
    _ONE_SEGMENT,
    after=1,
  ),
  *(
    Rule(
      (f'{name}/grad_norm',),
      lambda norm: norm.recent < 1e-6,
      'the gradient is zero, {0:.0e}: nothing is learned. Check the rows: their responses may be'
      ' empty or equal',
      after=3,
    )
    for name in ('sft', 'reward_model', 'dpo')
  ),
  Rule(
    ('reward_model/accuracy', 'eval/accuracy'),
    _overfits,
    'accuracy on held-out pairs falls, {1:.0%}, while that in training is {0:.0%}: the reward model'
    ' overfits. Use fewer epochs or a lower reward.optimizer.learning_rate',
    after=_MIN_EVALUATIONS,
  ),
  Rule(
    ('reward_model/accuracy',),
    lambda accuracy: accuracy.recent < 0.52,
    'after 200 steps the accuracy of the reward model is {0:.0%}, that of chance: check the pairs,'
    ' or raise reward.optimizer.learning_rate',
    after=200,
  ),
)
