"""Writes the tables of a study as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from segjax.report.stage_tables import Table, stage_tables


def markdown(title: str, results: Mapping[str, Any]) -> str:
  """Returns table.md of a study's results."""
  lines = [f'# {title}', '', f'{results["progress"]}.']
  for table in stage_tables('study', results):
    lines += ['', f'## {table.title}', '', f'{table.note[:1].upper()}{table.note[1:]}.', '']
    lines += _rows(table)
  return '\n'.join(lines) + '\n'


def _rows(table: Table) -> list[str]:
  if len(table.columns) == 1:
    return [f'* {row.label}' for row in table.rows]
  rows = [table.columns, ['---', *('---:' for _ in table.columns[1:])]]
  return [_line(row) for row in (*rows, *((row.label, *row.cells) for row in table.rows))]


def _line(cells: Sequence[str]) -> str:
  return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'
