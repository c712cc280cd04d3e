"""Chooses each arm's constants: the same trials for all arms, on seeds that are never shown.

An arm whose constants were chosen with more effort wins by the effort (Patterson et al. 2023,
https://arxiv.org/abs/2304.01315).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segjax import json_files
from segjax.config.study_arms import Arm, Overrides
from segjax.errors import UserError
from segjax.jobs.study_cells import Record
from segjax.storage import write_text_atomically

FILE = 'tuning.json'
CRITERION = 'area: mean gold reward over KL from 0 to the largest level, mean over the seeds'

Constants = dict[tuple[str, str], Overrides]  # by (language, arm)
Trial = tuple[str, str, int]  # language, arm, number of the point


def choose(
  trials: Sequence[Overrides], records: Mapping[Trial, Sequence[Record]]
) -> dict[str, dict[str, Any]]:
  """Returns what each arm tried on each language, with its scores, and the best.

  Args:
    trials: the points of the grid.
    records: of the cells of each trial, one for each seed.

  Returns:
    {language: {arm: {'choice': constants, 'trials': [{'settings', 'scores', 'mean'}]}}}. A trial
    with a cell that has no curve has no mean; without any mean nothing is chosen, and the arm keeps
    the constants of the config.
  """
  tuned: dict[str, dict[str, Any]] = {}
  for (language, arm, number), cells in sorted(records.items()):
    scores = [cell.get('area') for cell in cells]
    is_complete = scores and None not in scores
    mean = float(np.mean(scores)) if is_complete else None
    entry = tuned.setdefault(language, {}).setdefault(arm, {'choice': {}, 'trials': []})
    entry['trials'].append({'settings': trials[number], 'scores': scores, 'mean': mean})
  for arms in tuned.values():
    for entry in arms.values():
      best = max(entry['trials'], key=lambda x: -math.inf if x['mean'] is None else x['mean'])
      entry['choice'] = best['settings'] if best['mean'] is not None else {}
  return tuned


def write(path: Path, seeds: Sequence[int], tuned: Mapping[str, Any]) -> None:
  """Writes tuning.json: criterion, seeds, all trials with their scores, and the choices."""
  record = {'criterion': CRITERION, 'seeds': list(seeds), 'languages': tuned}
  write_text_atomically(path, json.dumps(record, indent=2) + '\n')


def read(path: Path, arms: Sequence[Arm], languages: Sequence[str]) -> Constants:
  """Returns the constants of a tuning.json, for each arm that is trained.

  Raises:
    UserError: the file is not one, or lacks an arm or a language.
  """
  where = f'config.study.tuning_file={path}'
  tuned = json_files.read_object(path).get('languages')
  constants: Constants = {}
  for language in languages:
    for arm in arms:
      if not arm.is_trained:
        continue
      try:
        constants[language, arm.name] = dict(tuned[language][arm.name]['choice'])
      except (KeyError, TypeError, ValueError):
        raise UserError(
          f'{where} has no choice for arm {arm.name!r} on {language!r}; tune it by study.trials.'
        ) from None
  return constants
