"""Compares arms of settings over seeds: runs every cell as a process, and says what differs.

What the runs are is in `study_graph`, how they are started in `study_pool`, how constants are tuned
in `study_tuning`.
"""

import time
from collections.abc import Callable, Sequence

from segjax.config.study_arms import kl_levels
from segjax.errors import UserError
from segjax.jobs import study_pool, study_tuning
from segjax.jobs.job import Job, Results
from segjax.jobs.study_board import TABLE_FILE, Board
from segjax.jobs.study_cells import FAILED, Record, read_cell
from segjax.jobs.study_graph import JOBS, Cell, Node
from segjax.jobs.study_plan import Plan, load, write_identity
from segjax.jobs.study_pool import Outcome
from segjax.jobs.study_tuning import Constants
from segjax.report import study_charts
from segjax.report.console import format_duration, table
from segjax.report.stage_tables import stage_tables
from segjax.run.stage import Stage


def run(stage: Stage, plan: Plan) -> Results:
  """Tunes the constants, runs the cells, and writes what they show after each of them.

  Returns:
    levels, progress, and the summary of `study_summary.summarize`.

  Raises:
    UserError: cells have failed; all others are done, and written.
  """
  write_identity(stage.directory.parent, plan.settings, plan.arms)
  constants = plan.constants
  if plan.trials:
    constants = _tune(stage, plan)
  cells = plan.cells(constants)
  board = Board(stage, plan, cells)
  _run_cells(stage, cells, board.add)
  results = board.write()
  failed = [record for record in board.records if record['status'] == FAILED]
  if failed:
    print_table(results)
    raise UserError(
      f'{len(failed)} of {len(cells)} cells failed, the first: {failed[0]["error"]}; the same '
      'command tries them again.'
    )
  return results


def _run_cells(stage: Stage, cells: Sequence[Cell], add: Callable[[Cell, str], None]) -> None:
  """Runs the cells; calls `add` with each one that has ended, and its error."""
  nodes = list(dict.fromkeys(node for cell in cells for node in cell.nodes))
  left, started = list(cells), time.monotonic()
  stage.log(f'{len(cells)} cells are {len(nodes)} runs, {stage.settings.study.jobs} at once')

  def ended(node: Node, outcome: Outcome) -> None:
    error = outcome[node.directory]
    elapsed = format_duration(time.monotonic() - started)
    stage.log(f'{len(outcome)} of {len(nodes)} runs in {elapsed}: {error or node.name}')
    for cell in list(left):
      cell_error = outcome.error(cell.nodes)
      if cell_error is not None:
        left.remove(cell)
        add(cell, cell_error)

  study_pool.run_all(nodes, stage.settings.study.jobs, ended)


def _tune(stage: Stage, plan: Plan) -> Constants:
  """Runs the trials, writes tuning.json and returns the constants of each arm."""
  seeds, levels = plan.tuning_seeds, kl_levels(plan.settings.study)
  trials = plan.trial_cells()
  stage.log(f'tuning: {len(plan.trials)} trials of each arm on {len(seeds)} seed(s)')
  records: dict[Cell, Record] = {}

  def add(cell: Cell, error: str) -> None:
    records[cell] = read_cell(cell, levels, error)

  cells = [cell for group in trials.values() for cell in group]
  _run_cells(stage, cells, add)
  by_trial = {trial: [records[cell] for cell in group] for trial, group in trials.items()}
  tuned = study_tuning.choose(plan.trials, by_trial)
  study_tuning.write(stage.directory / study_tuning.FILE, seeds, tuned)
  constants = {
    (language, arm): x['choice'] for language, arms in tuned.items() for arm, x in arms.items()
  }
  for (language, arm), choice in constants.items():
    text = ' '.join(f'{key}={value}' for key, value in choice.items()) or 'no trial succeeded'
    stage.log(f'tuned {arm} on {language}: {text}')
  return constants


def print_table(results: Results) -> None:
  """Prints the tables."""
  for content in stage_tables('study', results):
    rows = [(row.label, *row.cells) for row in content.rows]
    table(content.title, content.columns, rows)


def headline(stage: Stage, results: Results) -> str:
  """Returns the first verdict of the first language."""
  part = next(iter(results['summary'].values()), {'verdicts': []})
  return next(iter(part['verdicts']), '')


JOB = Job(
  name='study',
  load=load,
  run=run,
  # Those of its runs, which start from the study's settings.
  sections=tuple(dict.fromkeys(('study', *(x for job in JOBS.values() for x in job.sections)))),
  without_effect=('study.jobs',),
  outputs=(study_charts.RESULTS_FILE, TABLE_FILE),
  print_table=print_table,
  headline=headline,
)
