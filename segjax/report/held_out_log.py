"""Logs the gold reward of each held-out prompt during PPO, for comparisons by prompt."""

import json
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from segjax import processes
from segjax.storage import make_directory, read_json_lines, truncate_json_lines, writing

FILE = 'held_out.jsonl'


class HeldOutPoint(NamedTuple):
  """An evaluation: its step, mean KL in nats per response, and gold reward of each prompt [P]."""

  step: int
  kl: float
  gold: np.ndarray


class HeldOutLog:
  """Appends the evaluations of a PPO stage to its held_out.jsonl; only the first process writes.

  A step that is repeated after a restart replaces the lines that it wrote before.
  """

  BEFORE: ClassVar = -1  # the step of the policy before the first one

  def __init__(self, directory: Path):
    self._path, self._is_open = directory / FILE, False

  def write(self, step: int, kl: float, gold: np.ndarray) -> None:
    """Appends the evaluation of a step."""
    if not processes.is_first():
      return
    if not self._is_open:
      make_directory(self._path.parent)
      truncate_json_lines(self._path, step)
      self._is_open = True
    line = json.dumps({'step': step, 'kl': kl, 'gold': [round(float(x), 6) for x in gold]})
    with writing(self._path), self._path.open('a', encoding='utf-8') as out:
      out.write(line + '\n')


def read_held_out(directory: Path) -> list[HeldOutPoint]:
  """Returns the evaluations of a PPO stage in their order; [] if it logged none."""
  rows = read_json_lines(directory / FILE)
  return [HeldOutPoint(row['step'], row['kl'], np.array(row['gold'], float)) for row in rows]
