"""Summarises the cells of a study: figures by arm, comparisons with the baseline, verdicts.

A record is a line of results.jsonl, see `jobs.study_cells.read_cell`.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from segjax.evaluation import study_statistics
from segjax.evaluation.study_statistics import Comparison, Estimate

Record = dict[str, Any]

END = 'end'  # beside the levels of KL: the end of training
# Figures of an arm by table: counts of its cells, then means over them: key, label, digits.
FIGURES = {
  'runs': (
    ('cells', 'cells', 0),
    ('failed', 'failed', 0),
    ('diverged', 'diverged', 0),
    ('seconds', 'seconds', 0),
  ),
  'rewards of the SFT model’s clauses against their true credit': (
    ('reward_accuracy', 'accuracy of the reward model', 3),
    ('best_accuracy', 'best possible', 3),
    ('credit_sign', 'right signs', 2),
    ('credit_on_deciding_token', 'share on deciding tokens', 2),
    ('credit_advantage_spearman', 'ranks of the return to go', 2),
  ),
  'policies at the end': (
    ('area', 'mean gold over KL', 3),
    ('kl_end', 'KL, nats', 1),
    ('length', 'length', 1),
    ('segments', 'segments', 1),
    ('eos_rate', 'EOS', 3),
    ('repetition', 'repeated 4-grams', 3),
  ),
}


def summarize(
  records: Sequence[Record], arms: Sequence[str], family: Sequence[str], levels: Sequence[str]
) -> dict[str, Any]:
  """Returns the summary of a study by language.

  Args:
    records: of the cells that have ended, in any order.
    arms: names, the baseline first.
    family: the arms whose comparisons are corrected for their number.
    levels: of KL, as in the records; the main one first.

  Returns:
    {language: {'arms': {name: figures}, 'comparisons': {level or 'end': [comparison]},
    'verdicts': [text]}}, as JSON holds it.
  """
  languages = dict.fromkeys(record['language'] for record in records)
  return {
    language: _summarize_language(
      [r for r in records if r['language'] == language], arms, family, levels
    )
    for language in languages
  }


def _summarize_language(
  records: Sequence[Record], arms: Sequence[str], family: Sequence[str], levels: Sequence[str]
) -> dict[str, Any]:
  by_arm = {arm: [record for record in records if record['arm'] == arm] for arm in arms}
  comparisons = {
    where: study_statistics.with_holm(_compare(by_arm, where), family) for where in (*levels, END)
  }
  return {
    'arms': {arm: arm_figures(cells, levels) for arm, cells in by_arm.items()},
    'comparisons': {
      where: [vars(comparison) for comparison in group] for where, group in comparisons.items()
    },
    'verdicts': [
      study_statistics.verdict(comparison, describe_level(where))
      for where in (levels[0], END)
      for comparison in comparisons[where]
    ],
  }


def describe_level(where: str) -> str:
  """Returns where gold was read, in words."""
  return 'at the end' if where == END else f'at {where} nats'


def _compare(by_arm: dict[str, list[Record]], where: str) -> list[Comparison]:
  """Returns the comparisons of all arms but the first with it; none where it has no value."""
  (baseline, others), *rest = ((arm, _prompts(cells, where)) for arm, cells in by_arm.items())
  return [
    study_statistics.compare(arm, baseline, values, others)
    for arm, values in rest
    if set(values) & set(others)
  ]


def _prompts(cells: Sequence[Record], where: str) -> dict[int, np.ndarray]:
  """Returns the prompts' gold rewards by seed, of the cells that reached a level."""
  return {
    cell['seed']: np.array(cell['prompts'][where], float)
    for cell in cells
    if where in cell.get('prompts', {})
  }


def arm_figures(cells: Sequence[Record], levels: Sequence[str]) -> dict[str, Any]:
  """Returns the figures of an arm: counts, gold by level and at the end, credit, other means."""
  count = collections.Counter(cell['status'] for cell in cells)
  ends = np.array([cell['gold_end'] for cell in cells if 'gold_end' in cell], float)
  figures: dict[str, Any] = {
    'gold': {where: _gold(cells, where) for where in (*levels, END)},
    'iqm_end': study_statistics.iqm_interval(ends),
    'credit': study_statistics.hierarchical_interval(
      [np.array([cell['credit']], float) for cell in cells if cell.get('credit') is not None]
    ),
  }
  for key, *_ in (figure for group in FIGURES.values() for figure in group):
    values = [cell[key] for cell in cells if cell.get(key) is not None]
    figures[key] = float(np.mean(values)) if values else None
  return figures | {
    'cells': len(cells),
    'diverged': count['diverged'],
    'failed': count['failed'],
  }


def _gold(cells: Sequence[Record], where: str) -> Estimate:
  return study_statistics.hierarchical_interval(list(_prompts(cells, where).values()))
