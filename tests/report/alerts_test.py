"""Rules alert once when something goes wrong, and not on the curves of healthy runs."""

import numpy as np
import pytest

from segjax.report.alert_rules import RULES, MetricTrend
from segjax.report.alerts import AlertMonitor

HEALTHY = {
  'objective/kl': lambda x: 12 * x,
  'response/length_mean': lambda x: 250 + 60 * x,
  'policy/entropy': lambda x: 1.4 - 0.4 * x,
  'response/eos_rate': lambda x: 0.9 + 0.1 * x,
  'critic/explained_variance': lambda x: 0.1 + 0.5 * x,
  'policy/clipfrac': lambda x: 0.05,
  'policy/initial_ratio_deviation': lambda x: 0.02,
  'rollout/logprob_mismatch': lambda x: 0.0,
  'objective/reward': lambda x: 2 * x,
  'eval/reward': lambda x: 1.5 * x,
  'eval/gold': lambda x: x,
  'sft/loss': lambda x: 1.9 - 0.3 * x,
  'reward_model/loss': lambda x: 0.69 - 0.3 * x,
  'reward_model/accuracy': lambda x: 0.5 + 0.2 * x,
  'reward_model/segments': lambda x: 40,
  'reward_model/one_token_segments': lambda x: 10,
  'reward_model/grad_norm': lambda x: 1.0,
  'sft/grad_norm': lambda x: 1.0,
  'policy/grad_norm': lambda x: 0.2,
  'segments/per_response': lambda x: 50 + 10 * x,
  'segments/one_token': lambda x: 20,
  'objective/reward_std': lambda x: 2.0,
  'reward/clipped': lambda x: 0.001,
  'eval/accuracy': lambda x: 0.5 + 0.2 * x,
  'rollout/age_max': lambda x: 3.0,
  'dpo/loss': lambda x: 0.68 - 0.3 * x,
  'dpo/grad_norm': lambda x: 1.0,
}
# A part of the alert, and the curve that causes it.
UNHEALTHY = {
  'KL is high': {'objective/kl': lambda x: 400 * x},
  'KL is negative': {'objective/kl': lambda x: -3 * x},
  'has not moved': {'objective/kl': lambda x: 1e-6},
  'gradient of the policy is zero': {'policy/grad_norm': lambda x: 0.0},
  'only 10% of the responses end': {'response/eos_rate': lambda x: 0.1},
  'have shrunk to': {'response/length_mean': lambda x: 250 * (1 - 0.7 * x)},
  'most responses are empty': {'segments/per_response': lambda x: 0.2},
  'single token: 36.0 of the 40': {
    'segments/per_response': lambda x: 40,
    'segments/one_token': lambda x: 36,
  },
  'responses are one segment, 1.0': {
    'segments/per_response': lambda x: 1,
    'segments/one_token': lambda x: 0.1,
  },
  'all responses earn the same': {'objective/reward_std': lambda x: 0.0},
  'the reward has fallen': {'objective/reward': lambda x: -5 * x, 'eval/reward': lambda x: -x},
  '50% of the rewards are clipped': {'reward/clipped': lambda x: 0.5},
  'most segments are a single token: 8.9 of the 9.9': {
    'reward_model/segments': lambda x: 10,
    'reward_model/one_token_segments': lambda x: 9,
  },
  'one segment, 1.0 each': {
    'reward_model/segments': lambda x: 1.01,
    'reward_model/one_token_segments': lambda x: 0.1,
  },
  'the gradient is zero': {'sft/grad_norm': lambda x: 0.0},
  'gradient is zero, 0e+00: nothing is learned. Check the rows': {
    'reward_model/grad_norm': lambda x: 0.0
  },
  'gradient is zero, 1e-08: nothing is learned': {'dpo/grad_norm': lambda x: 1e-8},
  'overfits': {'eval/accuracy': lambda x: 0.5 + x - 1.2 * x**2},
  'entropy is collapsing': {'policy/entropy': lambda x: 1.4 * (1 - x) ** 2},
  'fewer responses end': {'response/eos_rate': lambda x: 0.9 - 0.35 * x},
  'tokens long, twice': {'response/length_mean': lambda x: 250 * (1 + 2 * x)},
  'no better than a constant': {'critic/explained_variance': lambda x: 0.0},
  'tokens are clipped': {'policy/clipfrac': lambda x: 0.5},
  'deviates from 1': {'policy/initial_ratio_deviation': lambda x: 3.0},
  'sampled from another distribution': {'rollout/logprob_mismatch': lambda x: 0.5},
  'responses are carried for longer': {'rollout/age_max': lambda x: 3 + 20 * x},
  'while eval/reward falls': {'eval/reward': lambda x: x - 1.5 * x**2},
  'while eval/gold falls': {'eval/gold': lambda x: x - 1.5 * x**2},
  'the loss has risen to 1': {'reward_model/loss': lambda x: 0.69 + 2 * x},
  'the loss has risen to 1.1': {'dpo/loss': lambda x: 0.68 + 5 * x},
  'the loss has risen to 2.9': {'sft/loss': lambda x: 1.9 + 2 * x},
  'that of chance': {'reward_model/accuracy': lambda x: 0.5},
}


def alerts(curves, steps=300, noise=0.05):
  monitor, rng, result = AlertMonitor(), np.random.default_rng(0), []
  for step in range(steps):
    values = {k: f(step / steps) * (1 + noise * rng.normal()) for k, f in curves.items()}
    if step % 10:
      values = {k: v for k, v in values.items() if not k.startswith('eval/')}
    result += monitor.update(values)
  return result


def test_silent_on_a_healthy_run():
  assert alerts(HEALTHY) == []


@pytest.mark.parametrize('words', UNHEALTHY)
def test_alerts_once(words):
  (alert,) = alerts(HEALTHY | UNHEALTHY[words], noise=0.01)
  assert words in alert


def test_a_critic_that_diverges_is_noticed_early():
  monitor = AlertMonitor()
  curve = [0.3] * 6 + [-4.0] * 4
  steps = [i for i, x in enumerate(curve) if monitor.update({'critic/explained_variance': x})]
  assert steps == [7]


def test_every_rule_is_tested():
  assert len(UNHEALTHY) == len(RULES)


def test_alerts_again_after_a_healthy_period():
  curve = [0.0] * 5 + [0.6] * 10 + [0.0] * 40 + [0.6] * 10
  monitor = AlertMonitor()
  steps = [i for i, value in enumerate(curve) if monitor.update({'policy/clipfrac': value})]
  assert len(steps) == 2 and steps[0] < 15 and steps[1] >= 55


def test_nan_and_absent_metrics_are_ignored():
  monitor = AlertMonitor()
  for value in (np.nan, np.inf, 0.9):
    assert monitor.update({'policy/clipfrac': value}) == []
  assert monitor.update({}) == []


def test_trend_starts_as_plain_means():
  trend = MetricTrend()
  for value in (1.0, 2.0, 3.0, 4.0, 5.0):
    trend.add(value)
  assert trend.first == trend.recent == 3 and trend.best == 3
  trend.add(13.0)
  assert trend.first == 3 and trend.recent == pytest.approx(3 + 0.2 * 10)
