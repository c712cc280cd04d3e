"""Tables of a stage's results for report.html: before and after, pairs by subset, marked errors.

The values are those that the stage printed on the console, with as many digits.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from segjax.data.limits import describe_counts
from segjax.evaluation.intervals import format_interval
from segjax.evaluation.study_summary import END, FIGURES, describe_level
from segjax.report import metric_names

_MIN_WIDTH = 1e-9  # of a scale: all values may be equal

# Figures of the job evaluate, in this order, on the page and on the console: label, digits.
EVALUATION = {
  'gold': ('Gold reward', 3),
  'gold_gain': ('Gain in gold reward', 3),
  'score': ("Reward model's score", 3),
  'score_gain': ("Gain in reward model's score", 3),
  'win_rate_gold': ('Win rate by gold reward', 3),
  'lc_win_rate_gold': ('Win rate by gold, equal lengths', 3),
  'win_rate_score': ('Win rate by score', 3),
  'lc_win_rate_score': ('Win rate by score, equal lengths', 3),
  'kl_nats': ('KL to the reference, nats', 2),
  'length': ('Response length, tokens', 1),
  'segments': ('Segments per response', 1),
  'eos_rate': ('Share that ends by itself', 3),
  'repeated_4grams': ('Share of repeated 4-grams', 3),
  'distinct_1': ('Share of distinct tokens', 3),
  'distinct_2': ('Share of distinct pairs', 3),
  'boundary_f1': ('F1 of segment boundaries', 3),
  'credit_spearman': ('Rewards against true credit, ranks', 3),
  'credit_advantage_spearman': ('Returns to go against it, ranks', 3),
  'credit_sign': ('Rewards with the sign of the credit', 3),
  'credit_on_deciding_token': ('Share of rewards on deciding tokens', 3),
}


@dataclasses.dataclass(frozen=True)
class Mark:
  """A mean with its interval on a scale; all three are shares of its width."""

  kind: str
  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Row:
  """A row: its label, its cells, and marks that are drawn behind them."""

  label: str
  cells: tuple[str, ...]
  marks: tuple[Mark, ...] = ()
  middle: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: its title, what was measured on what, the columns' names, its rows."""

  title: str
  note: str
  columns: tuple[str, ...]
  rows: list[Row]


def stage_tables(stage: str, results: Mapping[str, Any]) -> list[Table]:
  """Returns the tables of a stage's results; [] for a stage whose results are single numbers."""
  make = _TABLES.get(stage)
  return [table for table in make(results) if table.rows] if make else []


def format_value(value: Any, digits: int = 3) -> str:
  """Formats a number, or a mean with its 95 % interval."""
  if value is None:
    return ''
  if isinstance(value, Mapping):
    return format_interval(value, digits).replace(', ', ',\u00a0')  # not broken between lines
  return f'{value:,}' if isinstance(value, int) else f'{value:z,.{digits}f}'


def _evaluate(results: Mapping[str, Any]) -> list[Table]:
  before, after = results.get('before', {}), results.get('after', {})
  rows = []
  for key in [*EVALUATION, *(key for key in after | before if key not in EVALUATION)]:
    values = {'before': before.get(key), 'after': after.get(key)}
    if values['before'] is None and values['after'] is None:
      continue
    label, digits = EVALUATION.get(key, (metric_names.result_name('evaluate', key), 3))
    cells = tuple(format_value(value, digits) for value in values.values())
    rows.append(Row(label, cells, *_scale(key, values)))
  counts = {value.get('n') for value in after.values() if isinstance(value, Mapping)}
  number = f'{counts.pop():,} responses' if len(counts) == 1 else 'responses'
  note = f'{number} of each model to held-out prompts; means with 95 % intervals'
  return [Table('', note, ('', 'before', 'after'), rows)]


def _scale(key: str, values: Mapping[str, Any]) -> tuple[tuple[Mark, ...], float | None]:
  """Returns the marks of a row and the middle of its scale: a tie, or no gain."""
  if 'win_rate' in key:
    marks = _marks(values, (0.0, 1.0))
  elif key.endswith('_gain') and (end := _largest_end(values)):
    marks = _marks(values, (-end, end))
  else:
    return _marks(values), None
  return marks, 0.5 if marks else None


def _largest_end(values: Mapping[str, Any]) -> float:
  """Returns the largest absolute value within the intervals."""
  ends = [value.get(end) for value in values.values() if value for end in ('low', 'high')]
  return max((abs(end) for end in ends if end is not None), default=0.0)


def _evaluate_reward(results: Mapping[str, Any]) -> list[Table]:
  tables = []
  if pairs := results.get('pairs'):
    groups = {**pairs['subsets'], 'all pairs': pairs['all']}
    if pairs.get('untruncated') and pairs.get('truncated'):
      groups['pairs that were not truncated'] = pairs['untruncated']
    columns = (
      *('', 'pairs', 'accuracy [95 %]', 'accuracy of preferring the longer', 'margin', 'ECE'),
    )
    rows = [
      Row(
        name,
        (
          format_value(figures['accuracy']['n']),
          format_value(figures['accuracy']),
          *(format_value(figures[key]) for key in ('length_baseline_accuracy', 'margin', 'ece')),
        ),
        _marks({'after': figures['accuracy']}, (0.0, 1.0)),
        0.5,
      )
      for name, figures in groups.items()
    ]
    note = 'how often the preferred response scores higher'
    tables.append(Table('Preference pairs', note, columns, rows))
    sections = (pairs.get('reward_bench') or {}).items()
    rows = [Row(name, (format_value(value),)) for name, value in sections]
    tables.append(Table('RewardBench', 'by section', ('', 'accuracy'), rows))
  if spans := results.get('spans'):
    groups = {'all types': spans, **spans['types']}
    rows = [
      Row(
        name,
        tuple(format_value(figures[key]) for key in ('spans', 'auc', 'auc_within')),
        _marks({'after': figures['auc']}, (0.0, 1.0)),
        0.5,
      )
      for name, figures in groups.items()
    ]
    note = f'whether low segment rewards are on them; {spans["responses"]:,} responses'
    columns = ('', 'errors', 'AUC [95 %]', 'AUC within a response')
    tables.append(Table('Marked errors', note, columns, rows))
  rows = [Row(path, (describe_counts(x),)) for path, x in results.get('counts', {}).items()]
  return [*tables, Table('Files', 'what was read of each', ('', 'rows'), rows)]


def _study(results: Mapping[str, Any]) -> list[Table]:
  """Returns for each language verdicts, gold by level, differences to the baseline, the rest."""
  tables, levels = [], [*sorted(results['levels'], key=float), END]
  for language, part in results['summary'].items():
    arms = part['arms']
    note = 'a difference is claimed where its interval excludes 0'
    verdicts = [Row(text, ()) for text in part['verdicts']]
    tables.append(Table(f'{language}: verdicts', note, ('',), verdicts))
    gold = [
      Row(
        name,
        (
          *(_reached(x, where) for where in levels),
          *(format_value(x[key], 2) for key in ('iqm_end', 'credit')),
        ),
      )
      for name, x in arms.items()
    ]
    note = (
      'means [95 %] over seeds; in parentheses how many seeds reached this KL, if not all; credit: '
      'Spearman’s correlation of the rewards of the SFT model’s clauses with their true credit'
    )
    columns = ('', *map(describe_level, levels), 'IQM at the end', 'credit')
    tables.append(Table(f'{language}: gold reward at equal KL', note, columns, gold))
    tables += _differences(language, part['comparisons'])
    for title, group in FIGURES.items():
      rows = [
        Row(name, tuple(format_value(x[key], digits) for key, _, digits in group))
        for name, x in arms.items()
      ]
      columns = ('', *(label for _, label, _ in group))
      tables.append(Table(f'{language}: {title}', 'means over cells', columns, rows))
  return tables


def _differences(
  language: str, comparisons: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Table]:
  """Returns a table of the differences to the baseline for each place where gold is read."""
  tables = []
  for where, group in comparisons.items():
    end = _largest_end({c['arm']: c['difference'] for c in group})
    rows = [
      Row(
        c['arm'],
        (
          format_value(c['difference'], 2),
          format_value(c['difference']['n']),
          format_value(c['improvement'], 2),
          *(format_value(c[key]) for key in ('p', 'adjusted_p')),
        ),
        _marks({'after': c['difference']}, (-end, end)),
        0.5,
      )
      for c in group
    ]
    baseline = group[0]['baseline'] if group else ''
    note = (
      'paired by seed; P: a run of the arm is better; p: random signs of the seeds’ differences'
    )
    columns = ('', 'difference [95 %]', 'seeds', 'P', 'p', 'p after Holm')
    title = f'{language}: gold minus that of {baseline}, {describe_level(where)}'
    tables.append(Table(title, note, columns, rows))
  return tables


def _reached(figures: Mapping[str, Any], where: str) -> str:
  gold = figures['gold'][where]
  is_partial = 0 < gold['n'] < figures['gold'][END]['n']
  return format_value(gold, 2) + (f' ({gold["n"]})' if is_partial else '')


def _marks(values: Mapping[str, Any], scale: tuple[float, float] | None = None) -> tuple[Mark, ...]:
  """Returns the marks of the values that have an interval, on a scale that holds all of them."""
  intervals = {
    kind: value
    for kind, value in values.items()
    if isinstance(value, Mapping) and isinstance(value.get('low'), float | int)
  }
  if not intervals:
    return ()
  ends = [end for value in intervals.values() for end in (value['low'], value['high'])]
  low, high = scale or (min(ends), max(ends))
  width = max(high - low, _MIN_WIDTH)

  def share(x: float) -> float:
    return round(min(1.0, max(0.0, (x - low) / width)), 4)

  return tuple(
    Mark(kind, share(value['mean']), share(value['low']), share(value['high']))
    for kind, value in intervals.items()
  )


_TABLES: dict[str, Callable[[Mapping[str, Any]], Sequence[Table]]] = {
  'evaluate': _evaluate,
  'evaluate_reward': _evaluate_reward,
  'study': _study,
}
