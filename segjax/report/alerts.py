"""What to worry about in a run, in words: rules over smoothed metrics, each told once as it begins.

A rule sees, of every metric, its first value, its recent and its best level, never the whole curve:
memory does not grow. Thresholds are those of practice with language models of 1 to 70 B; each is
named in its rule.
"""

import dataclasses
import math
from collections.abc import Callable

_FIRST = 5  # values that make up the level at the start
_SMOOTH = 0.2  # weight of the newest value in the recent level
_EARLIEST = 10  # values before a rule about a trend speaks
_FEW = 4  # the same for metrics of evaluation, which come seldom


@dataclasses.dataclass
class MetricTrend:
  """A metric: mean of its first values, exponential mean of the recent ones, highest of those."""

  count: int = 0
  first: float = 0.0
  recent: float = 0.0
  best: float = -math.inf

  def add(self, value: float) -> None:
    """Takes the next value."""
    self.count += 1
    if self.count <= _FIRST:
      self.first += (value - self.first) / self.count
    weight = max(_SMOOTH, 1 / self.count)
    self.recent += weight * (value - self.recent)
    self.best = max(self.best, self.recent)


Trends = dict[str, MetricTrend]


@dataclasses.dataclass(frozen=True)
class Rule:
  """When something is wrong, and what to say.

  Attributes:
    metrics: that it reads; it is silent until all have been seen `after` times.
    holds: of their trends, in that order.
    text: with {0}, {1} for their recent levels.
  """

  metrics: tuple[str, ...]
  holds: Callable[..., bool]
  text: str
  after: int = _EARLIEST


def _fell_from_best(held_out: MetricTrend) -> bool:
  """By more than a quarter of what was gained."""
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
    'entropy is collapsing, {0:.2f} nats a token: responses become all alike. Raise ppo.kl_coef, or'
    ' give ppo.entropy_coef a small value such as 0.001',
  ),
  Rule(
    ('response/eos_rate',),
    lambda rate: rate.recent < rate.first - 0.2,
    'fewer responses end, {0:.0%}. Raise rollout.max_new_tokens, or set '
    'reward_shaping.missing_eos_penalty=at_eos',
  ),
  Rule(
    ('response/length_mean',),
    lambda length: length.recent > 2 * length.first + 8,
    'responses have become {0:.0f} tokens long, twice those at the start: look whether they are'
    ' better or only longer. Try reward_shaping.length_penalty=linear or a higher ppo.kl_coef',
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
    'the clip holds {0:.0%} of the tokens: updates are too large. Lower'
    ' ppo.policy_optimizer.learning_rate or ppo.num_ppo_epochs',
    after=3,
  ),
  Rule(
    ('policy/initial_ratio_deviation',),
    lambda deviation: deviation.recent > 0.5,
    'before any update a token is {0:.2f} away from ratio 1: sampling and training disagree. Run'
    ' configs/selfcheck.py, or set rollout.recompute_logprob',
    after=3,
  ),
  Rule(
    ('rollout/logprob_mismatch',),
    lambda gap: gap.recent > 0.2,
    'responses are drawn from another distribution than the one trained, {0:.2f} nats a token: use'
    ' rollout.temperature=1, top_p=1 and top_k=0 for unbiased updates',
    after=3,
  ),
  *(
    Rule(
      ('objective/reward', held_out),
      lambda reward, held_out: reward.recent > reward.first and _fell_from_best(held_out),
      f'reward rises while {held_out} falls, {{1:.3f}}: the reward model is being exploited. Stop'
      ' at the best checkpoint (checkpoint.best_metric), raise ppo.kl_coef, or train the reward '
      'model on'
      ' responses of this policy',
      after=_FEW,
    )
    for held_out in ('eval/reward', 'eval/gold')
  ),
  Rule(
    ('train/loss',),
    lambda loss: loss.recent > 1.5 * loss.first + 0.1,
    'the loss has risen to {0:.2f}. Lower the learning rate, or raise warmup_ratio',
  ),
  Rule(
    ('train/accuracy',),
    lambda accuracy: accuracy.recent < 0.52,
    'after 200 steps the reward model is right on {0:.0%} of the pairs, as by chance: look at the'
    ' pairs, or raise reward.optimizer.learning_rate',
    after=200,
  ),
)


class AlertMonitor:
  """Follows a run; a rule that holds is told once, and again after it has not held for a while."""

  def __init__(self, rules: tuple[Rule, ...] = RULES):
    self._rules = rules
    self._trends: Trends = {name: MetricTrend() for rule in rules for name in rule.metrics}
    self._quiet = dict.fromkeys(range(len(rules)), _EARLIEST)  # looks since it last held

  @property
  def names(self) -> list[str]:
    """The metrics that any rule reads."""
    return list(self._trends)

  def look(self, metrics: dict[str, float]) -> list[str]:
    """What begins to be wrong with these metrics of the next step."""
    for name, trend in self._trends.items():
      value = metrics.get(name, math.nan)
      if math.isfinite(value):
        trend.add(value)
    said = []
    for index, rule in enumerate(self._rules):
      trends = [self._trends[name] for name in rule.metrics]
      if not (min(t.count for t in trends) >= rule.after and rule.holds(*trends)):
        self._quiet[index] += 1
        continue
      if self._quiet[index] >= _EARLIEST:
        said.append(rule.text.format(*(trend.recent for trend in trends)))
      self._quiet[index] = 0
    return said
