"""What an evaluation prints at the end of a run: the table of its figures, and one sentence."""

from typing import Any

from segjax.evaluation.intervals import format_interval
from segjax.report.console import table
from segjax.run.stage import Stage

_LABELS = {
  'gold': ('gold reward [95 % interval]', 3),
  'gold_gain': ('  gain', 3),
  'score': ('score [95 % interval]', 3),
  'score_gain': ('  gain', 3),
  'win_rate_gold': ('win rate by gold reward', 3),
  'lc_win_rate_gold': ('  at equal length', 3),
  'win_rate_score': ('win rate by score', 3),
  'lc_win_rate_score': ('  at equal length', 3),
  'kl_nats': ('KL to the reference, nats', 2),
  'length': ('length, tokens', 1),
  'segments': ('segments per response', 1),
  'eos_rate': ('share that ends in EOS', 3),
  'repeated_4grams': ('share of repeated 4-grams', 3),
  'distinct_1': ('share of distinct tokens', 3),
  'distinct_2': ('share of distinct pairs', 3),
  'boundary_f1': ('F1 of segment boundaries', 3),
}


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures of `run` as a table."""

  def cell(value, digits):
    if value is None:
      return ''
    return format_interval(value, digits) if isinstance(value, dict) else f'{value:z.{digits}f}'

  rows = []
  for key, (label, digits) in _LABELS.items():
    values = [figures[name].get(key) for name in ('before', 'after')]
    if values != [None, None]:
      rows.append((label, *(cell(value, digits) for value in values)))
  table('Held-out prompts', ('', 'before PPO', 'after PPO'), rows)


def headline(stage: Stage, figures: dict[str, Any]) -> str:
  """Returns how the gold reward, or else the score, changed from reference to policy."""
  before, after = figures['before'], figures['after']
  for name, label in (('gold', 'gold reward'), ('score', 'score')):
    if f'{name}_gain' not in after:
      continue
    gain = after[f'{name}_gain']
    low, high = gain['low'], gain['high']
    verb = 'rose' if gain['mean'] > 0 else 'fell'
    interval = ''
    if low is not None:
      interval = f', 95 % interval [{low:+.3f}, {high:+.3f}]'
      if low <= 0 <= high:
        verb = 'did not change measurably,'
    return (
      f'{label} on held-out prompts {verb} from {before[name]["mean"]:z.3f} before PPO to '
      f'{after[name]["mean"]:z.3f} after it: {gain["mean"]:+.3f}{interval}'
    )
  return ''
