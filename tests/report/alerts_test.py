"""Rules alert once when something goes wrong, and not on the curves of healthy runs."""

import numpy as np
import pytest

from segjax.report.alerts import RULES, AlertMonitor, MetricTrend

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
}
# A part of the alert, and the curve that causes it.
UNHEALTHY = {
  'KL is high': {'objective/kl': lambda x: 400 * x},
  'entropy is collapsing': {'policy/entropy': lambda x: 1.4 * (1 - x) ** 2},
  'fewer responses end': {'response/eos_rate': lambda x: 0.9 - 0.7 * x},
  'tokens long, twice': {'response/length_mean': lambda x: 250 * (1 + 2 * x)},
  'critic predicts worse': {'critic/explained_variance': lambda x: -0.4},
  'tokens are clipped': {'policy/clipfrac': lambda x: 0.5},
  'deviates from 1': {'policy/initial_ratio_deviation': lambda x: 3.0},
  'sampled from another distribution': {'rollout/logprob_mismatch': lambda x: 0.5},
  'while eval/reward falls': {'eval/reward': lambda x: x - 1.5 * x**2},
  'while eval/gold falls': {'eval/gold': lambda x: x - 1.5 * x**2},
  'the loss has risen to 1': {'reward_model/loss': lambda x: 0.69 + 2 * x},
  'the loss has risen to 3.': {'sft/loss': lambda x: 1.9 + 2 * x},
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
