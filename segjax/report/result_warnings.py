"""Warnings about the results of a finished stage: figures that cast doubt on it, and the remedy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class ResultRule:
  """A condition on results and the warning about them.

  Attributes:
    stage: the stage whose results it reads.
    names: names of the results; nested ones joined by dots, of an interval its mean.
    holds: the condition, a function of their values in that order.
    text: the warning; {0}, {1} are replaced by the values.
  """

  stage: str
  names: tuple[str, ...]
  holds: Callable[..., bool]
  text: str


RULES = (
  ResultRule(
    'normalizer',
    ('r2_mean', 'r2_std'),
    lambda mean, std: min(mean, std) < 0,
    'the normaliser describes the scores worse than a constant, R² {0:.2f} of the mean and {1:.2f}'
    ' of the standard deviation. Set normalizer.weighting=count, or normalizer.kind=global; with'
    ' few pairs use more',
  ),
  ResultRule(
    'reward',
    ('held_out_accuracy',),
    lambda accuracy: accuracy < 0.55,
    'accuracy on held-out rows is {0:.0%}, near that of chance: PPO on this reward model learns'
    ' noise. Check the rows and the chat template, train longer, or raise'
    ' reward.optimizer.learning_rate',
  ),
  ResultRule(
    'reward',
    ('held_out_accuracy', 'held_out_length_baseline_accuracy'),
    lambda accuracy, baseline: 0.55 <= accuracy < baseline,
    'accuracy on held-out pairs is {0:.0%}; that of choosing the longer response is {1:.0%}.'
    ' Balance the lengths of the pairs, or train longer',
  ),
  ResultRule(
    'dpo',
    ('held_out_accuracy',),
    lambda accuracy: accuracy < 0.55,
    'the implicit reward is right in {0:.0%} of the held-out pairs, near chance. Check the pairs'
    ' and the chat template, train longer, or raise dpo.optimizer.learning_rate',
  ),
  ResultRule(
    'evaluate',
    ('after.eos_rate',),
    lambda rate: rate < 0.5,
    'only {0:.0%} of the responses end with a stop token: scores and lengths are those of texts'
    ' that are cut off. Raise rollout.max_new_tokens',
  ),
  ResultRule(
    'evaluate',
    ('before.score', 'after.score', 'before.gold', 'after.gold'),
    lambda score, new_score, gold, new_gold: new_score > score and new_gold < gold,
    'the score of the reward model has risen from {0:.2f} to {1:.2f} and the gold reward has fallen'
    ' from {2:.2f} to {3:.2f}: the reward model was exploited. Raise ppo.kl_coef, or stop earlier',
  ),
)


def result_warnings(stage: str, results: dict[str, Any]) -> list[str]:
  """Returns the warnings about the results of a stage."""
  texts = []
  for rule in RULES:
    if rule.stage != stage:
      continue
    values = [_lookup(results, name) for name in rule.names]
    if all(math.isfinite(value) for value in values) and rule.holds(*values):
      texts.append(rule.text.format(*values))
  return texts


def _lookup(results: Any, name: str) -> float:
  """Returns a number out of nested results; NaN where there is none."""
  for part in (*name.split('.'), 'mean'):
    if isinstance(results, dict):
      results = results.get(part)
  return float(results) if isinstance(results, float | int) else math.nan
