"""Alerts: rules over smoothed metrics that describe what is going wrong in a run, and the remedy.

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
_REARM_AFTER = 10  # steps for which a rule must not hold before it alerts again


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
    lambda entropy: entropy.recent < 0.3 * entropy.first,
    'entropy is collapsing, {0:.2f} nats per token: responses become alike. Raise ppo.kl_coef, or'
    ' set ppo.entropy_coef to a small value such as 0.001',
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
    ('critic/explained_variance',),
    lambda variance: variance.recent < 0,
    'the critic predicts worse than a constant, explained variance {0:.2f}. Set'
    ' critic.warmup_rollouts, critic.init=reward_model, or raise '
    'ppo.critic_optimizer.learning_rate',
    after=20,
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
    'before any update the ratio of a token deviates from 1 by {0:.2f}: sampling and training'
    ' disagree. Run configs/selfcheck.py, or set rollout.recompute_logprob',
    after=3,
  ),
  Rule(
    ('rollout/logprob_mismatch',),
    lambda mismatch: mismatch.recent > 0.2,
    'responses are sampled from another distribution than the one trained, {0:.2f} nats per token:'
    ' use rollout.temperature=1, top_p=1 and top_k=0 for unbiased updates',
    after=3,
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
    for name in ('sft/loss', 'reward_model/loss')
  ),
  Rule(
    ('reward_model/accuracy',),
    lambda accuracy: accuracy.recent < 0.52,
    'after 200 steps the accuracy of the reward model is {0:.0%}, that of chance: check the pairs,'
    ' or raise reward.optimizer.learning_rate',
    after=200,
  ),
)


class AlertMonitor:
  """Applies the rules to a run's metrics; each alerts once and re-arms after 10 quiet steps."""

  def __init__(self, rules: tuple[Rule, ...] = RULES):
    self._rules = rules
    self._trends = {name: MetricTrend() for rule in rules for name in rule.metrics}
    self._quiet_steps = [_REARM_AFTER] * len(rules)  # since the rule last held

  @property
  def metrics(self) -> list[str]:
    """Names of the metrics that the rules read."""
    return list(self._trends)

  def update(self, metrics: dict[str, float]) -> list[str]:
    """Adds the metrics of the next step; returns the alerts that begin with it."""
    for name, trend in self._trends.items():
      value = metrics.get(name, math.nan)
      if math.isfinite(value):
        trend.add(value)
    alerts = []
    for index, rule in enumerate(self._rules):
      trends = [self._trends[name] for name in rule.metrics]
      if min(trend.count for trend in trends) < rule.after or not rule.holds(*trends):
        self._quiet_steps[index] += 1
        continue
      if self._quiet_steps[index] >= _REARM_AFTER:
        alerts.append(rule.text.format(*(trend.recent for trend in trends)))
      self._quiet_steps[index] = 0
    return alerts
