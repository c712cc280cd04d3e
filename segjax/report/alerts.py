"""Alerts: applies the rules of `alert_rules` to the metrics of a run, live and on the page."""

import math

from segjax.report.alert_rules import RULES, MetricTrend, Rule

_REARM_AFTER = 10  # steps for which a rule must not hold before it alerts again


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
