"""Reads what a finished cell of a study has reached, as a line of results.jsonl."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segjax import json_files
from segjax.evaluation.intervals import clustered_interval
from segjax.evaluation.study_curves import Curve, best_of_n, first_reached
from segjax.jobs import demo, evaluate
from segjax.jobs.study_graph import Cell
from segjax.report import stage_history
from segjax.report.held_out_log import read_held_out
from segjax.report.response_log import RESPONSES_FILE as RESPONSES_LOG
from segjax.storage import read_json_lines

Record = dict[str, Any]

DONE, DIVERGED, FAILED = 'done', 'diverged', 'failed'
_SKIPPED = 'max_skipped_steps'  # in the message of a run that its updates stopped


def read_cell(cell: Cell, levels: list[float], error: str) -> Record:
  """Returns the record of a cell that has ended.

  A cell has diverged if its updates were not finite, or if it ended below the gold reward of the
  SFT model (`has_lost`); it has failed if it stopped for any other reason.

  Args:
    levels: of KL, in nats.
    error: of one of its runs; '' if all have succeeded.
  """
  record: Record = {
    'arm': cell.arm.name,
    'language': cell.language,
    'seed': cell.seed,
    'hash': cell.node.directory.name.rpartition('-')[2],
    'settings': cell.overrides,
    'directory': str(cell.node.directory),
  }
  if error:
    status = DIVERGED if _SKIPPED in error else FAILED
    return record | {'status': status, 'error': error}
  directory = cell.node.directory
  evaluation = stage_history.load_stage(directory / 'evaluate')
  results = evaluation['results']
  responses = json_files.read_object(directory / 'evaluate' / evaluate.RESPONSES_FILE)
  if cell.arm.is_trained:
    points = read_held_out(directory / 'ppo')
    curve = first_reached(
      np.array([point.kl for point in points]), np.array([point.gold for point in points])
    )
    gold = _by_prompt(responses, 'after')
  else:
    scored = responses['after']
    curve = best_of_n(
      np.array(scored['score']), np.array(scored['gold']), np.array(responses['prompt'])
    )
    gold = curve.gold[-1]
  before, after = _by_prompt(responses, 'before'), results['after']
  seconds = [
    stage_history.load_stage(directory / stage)['results']['seconds'] for stage in cell.arm.stages
  ]
  return (
    record
    | {
      'status': DIVERGED if has_lost(before, gold) else DONE,
      'source': evaluation['key']['versions'].get('segjax source', ''),
      'gold_before': float(before.mean()),
      'gold_end': float(gold.mean()),
      'kl_end': after['kl_nats'] if cell.arm.is_trained else float(curve.kl[-1]),
      'area': curve.area(max(levels)),
      'length': after['length'],
      'eos_rate': after['eos_rate'],
      'repetition': after['repeated_4grams'],
      'segments': after['segments'],
      'seconds': sum(seconds),
    }
    | _reward_model_figures(cell)
    | (_credit_figures(results['before']) if cell.arm.is_trained else {})
    | _curve_figures(curve, levels if cell.arm.is_trained else [], gold)
  )


def has_lost(before: np.ndarray, after: np.ndarray) -> bool:
  """Returns whether gold reward fell: the 95 % interval over prompts of its gain is below 0."""
  high = clustered_interval(after - before, np.arange(len(before)))['high']
  return high is not None and high < 0


def _curve_figures(curve: Curve, levels: list[float], gold: np.ndarray) -> Record:
  """Returns the curve, and the prompts' gold rewards at the levels that it reached and the end."""
  at = {f'{level:g}': curve.at(level) for level in levels}
  prompts = {name: _rounded(values) for name, values in at.items() if values is not None}
  return {
    'curve': [
      [round(float(k), 4), float(g.mean())] for k, g in zip(curve.kl, curve.gold, strict=True)
    ],
    'at_kl': {name: None if x is None else float(x.mean()) for name, x in at.items()},
    'prompts': prompts | {'end': _rounded(gold)},
  }


def _credit_figures(before: Record) -> Record:
  """Returns how well the arm's rewards of the SFT model's clauses agree with their true credit."""
  return {
    'credit' if name == 'spearman' else f'credit_{name}': before[f'credit_{name}']['mean']
    for name in evaluate.CREDIT
    if f'credit_{name}' in before
  }


def _reward_model_figures(cell: Cell) -> Record:
  """Returns the accuracy of the cell's reward model, and the best that the labels allow."""
  if cell.reward is None:
    return {}
  directory = cell.reward.directory / 'reward'
  return {
    'reward_accuracy': stage_history.load_stage(directory)['results']['held_out_accuracy'],
    'best_accuracy': _best_accuracy(cell.base.directory / 'demo' / 'rows', directory),
  }


@functools.lru_cache(maxsize=4096)  # several arms share a reward model
def _best_accuracy(rows: Path, directory: Path) -> float:
  held_out = json.loads((directory / 'held_out.json').read_text(encoding='utf-8'))
  return demo.best_possible_accuracy(rows, held_out)


def _by_prompt(responses: Record, model: str) -> np.ndarray:
  """Returns the mean gold reward of each prompt's responses, [P]."""
  prompt = responses['prompt']
  return np.bincount(prompt, responses[model]['gold']) / np.bincount(prompt)


def _rounded(values: np.ndarray) -> list[float]:
  return [round(float(x), 6) for x in values]


def typical_responses(cell: Cell, count: int) -> Iterator[Record]:
  """Yields logged responses of a cell for the report, under the name of its arm.

  Those to one prompt have one number for all arms, so that they are shown together.
  """
  path = cell.node.directory / 'evaluate' / RESPONSES_LOG
  for row in [row for row in read_json_lines(path) if row['model'] == 'after'][:count]:
    yield row | {'model': f'{cell.arm.name}, {cell.language}'}
