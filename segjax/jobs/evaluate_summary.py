"""What an evaluation prints at the end of a run: the table of its figures, and one sentence."""

from typing import Any

from segjax.evaluation.intervals import format_interval
from segjax.report.console import table
from segjax.report.metric_names import PART, result_name
from segjax.report.stage_tables import EVALUATION
from segjax.run.stage import Stage


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures of `run` as a table."""

  def cell(value, digits):
    if value is None:
      return ''
    return format_interval(value, digits) if isinstance(value, dict) else f'{value:z.{digits}f}'

  rows = []
  for key, (label, digits) in EVALUATION.items():
    values = [figures[name].get(key) for name in ('before', 'after')]
    if values != [None, None]:
      rows.append((label, *(cell(value, digits) for value in values)))
  for key in (key for key in figures['after'] if key.startswith(PART)):
    values = [figures[name][key] for name in ('before', 'after')]
    rows.append((result_name('evaluate', key), *(cell(value, 3) for value in values)))
  table('Held-out prompts, means [95 % intervals]', ('', 'before PPO', 'after PPO'), rows)


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
