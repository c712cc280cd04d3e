"""Keeps the records of a study's cells, and writes what they show as they come in."""

import json
import time
from collections.abc import Sequence

from segjax.config.study_arms import kl_levels
from segjax.evaluation.study_summary import summarize
from segjax.jobs.job import Results
from segjax.jobs.study_cells import Record, read_cell, typical_responses
from segjax.jobs.study_graph import Cell
from segjax.jobs.study_plan import Plan
from segjax.report import study_charts, study_table
from segjax.report.response_log import RESPONSES_FILE
from segjax.run.stage import Stage
from segjax.storage import write_text_atomically

TABLE_FILE = 'table.md'
_MAX_SHARE = 0.05  # of the time that may be spent on summaries


class Board:
  """Keeps the records of the cells, and writes tables, charts and responses as they come in."""

  def __init__(self, stage: Stage, plan: Plan, cells: Sequence[Cell]):
    self._stage, self._plan, self._cells = stage, plan, cells
    self._levels = kl_levels(stage.settings.study)
    self._records: dict[Cell, Record] = {}
    self._due = 0.0

  @property
  def records(self) -> list[Record]:
    """Of the cells that have ended, in the order of the study."""
    return [self._records[cell] for cell in self._cells if cell in self._records]

  def add(self, cell: Cell, error: str) -> None:
    """Adds a cell that has ended to results.jsonl, and now and then to what is made of it."""
    self._records[cell] = read_cell(cell, self._levels, error)
    lines = ''.join(json.dumps(record) + '\n' for record in self.records)
    write_text_atomically(self._stage.directory / study_charts.RESULTS_FILE, lines)
    begun = time.monotonic()
    if begun >= self._due:
      self.write()
      self._stage.refresh()
      now = time.monotonic()
      self._due = now + (now - begun) / _MAX_SHARE

  def write(self) -> Results:
    """Writes table.md, charts and responses of the cells so far; returns the results."""
    directory, plan, records = self._stage.directory, self._plan, self.records
    names = [arm.name for arm in plan.arms]
    family = [arm.name for arm in plan.arms[1:] if not arm.is_yardstick]
    summary = summarize(records, names, family, plan.levels)
    results = {
      'progress': f'{len(records)} of {len(self._cells)} cells',
      'levels': plan.levels,
      'summary': summary,
    }
    study_charts.write_summary(directory, summary)
    title = f'Study of {len(names)} arms on {len(plan.seeds)} seeds'
    write_text_atomically(directory / TABLE_FILE, study_table.markdown(title, results))
    study_charts.write_pngs(directory)
    self._write_responses()
    return results

  def _write_responses(self) -> None:
    """Writes typical responses of each arm, of the first seed on which it has ended."""
    settings, first = self._stage.settings, {}
    for cell in self._cells:
      if 'gold_end' in self._records.get(cell, {}) and cell.arm.is_trained:
        first.setdefault((cell.language, cell.arm.name), cell)
    rows = (
      row
      for cell in first.values()
      for row in typical_responses(cell, settings.report.responses_per_rollout)
    )
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    write_text_atomically(self._stage.directory / RESPONSES_FILE, text)
