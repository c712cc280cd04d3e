"""Writes the tables of a study as Markdown, with the verdicts above them."""

from collections.abc import Mapping
from typing import Any

from segjax.report.stage_tables import Table, stage_tables


def markdown(title: str, results: Mapping[str, Any]) -> str:
  """Returns table.md of a study's results."""
  lines = [f'# {title}', '', results['progress']]
  for language, part in results['summary'].items():
    lines += ['', f'## {language}', '']
    lines += [f'* {verdict}' for verdict in part['verdicts']]
  for table in stage_tables('study', results):
    lines += ['', *_table(table)]
  return '\n'.join(lines) + '\n'


def _table(table: Table) -> list[str]:
  rows = [table.columns, ['---', *('---:' for _ in table.columns[1:])]]
  rows += [(row.label, *row.cells) for row in table.rows]
  return [f'### {table.title}', '', f'{table.note}.', '', *map(_line, rows)]


def _line(cells: Any) -> str:
  return '| ' + ' | '.join(str(cell).replace('|', r'\|') for cell in cells) + ' |'
