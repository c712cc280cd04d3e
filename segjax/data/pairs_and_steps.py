"""Rows that a reward model is trained on: preference pairs, labels of steps, or both in one run.

Each update has `batch_size` pairs and, beside them, responses with labelled steps in proportion to
the data: batch_size · (labelled responses) / (pairs), rounded to a number that divides over the
devices, at least that of one piece. So every update sees both, one pass over the pairs is about one
over the labelled responses, and all updates have the same shapes. Weights of sources
(`steps.jsonl*0.5`) change the proportion. The pairs of an update are those of a run on pairs alone.

Without pairs an update has `batch_size` labelled responses.
"""

import dataclasses
from typing import Any

import numpy as np

from segjax.data.batches import (
  Pairs,
  Steps,
  batch_indices,
  endless_batch_indices,
  select,
  split_holdouts,
)


@dataclasses.dataclass(frozen=True)
class PairsAndSteps:
  """Pairs, and responses with labelled steps, of one source; None for what it does not have."""

  pairs: Pairs | None = None
  steps: Steps | None = None

  @property
  def parts(self) -> list[Pairs | Steps]:
    """Those that there are, pairs first: their batches decide how many updates there are."""
    return [part for part in (self.pairs, self.steps) if part is not None]

  def __len__(self) -> int:
    return sum(len(part) for part in self.parts)

  @property
  def counts(self) -> dict[str, int]:
    """`rows` of the source."""
    return {'rows': self.parts[0].counts['rows']}

  @property
  def row(self) -> np.ndarray:
    """Index of each row in its source, sorted, int64 [N]."""
    return np.sort(np.concatenate([part.row for part in self.parts]))

  def num_labels(self) -> int:
    """Returns the number of labelled steps."""
    if self.steps is None:
      return 0
    labels = (self.steps.labels[index] for index in range(len(self.steps)))
    return int(sum((~np.isnan(row)).sum() for row in labels))

  def describe(self) -> str:
    """Returns how many there are of each, as text."""
    names = {'pairs': self.pairs, 'responses with labelled steps': self.steps}
    return ' and '.join(f'{len(part)} {name}' for name, part in names.items() if part is not None)

  def split_holdout(self, fraction: float, seed: int) -> tuple['PairsAndSteps', 'PairsAndSteps']:
    """Returns (training set, held-out set), by `batches.split_holdouts`."""
    splits = iter(split_holdouts(self.parts, fraction, seed))
    both = [(None, None) if part is None else next(splits) for part in (self.pairs, self.steps)]
    train, held_out = zip(*both, strict=True)
    return PairsAndSteps(*train), PairsAndSteps(*held_out)

  def first(self, count: int) -> 'PairsAndSteps':
    """Returns the first `count` pairs and the first `count` labelled responses."""
    return PairsAndSteps(*(_first(part, count) for part in (self.pairs, self.steps)))

  def batch_rows(
    self, batch_size: int, piece: int, seed: int, step: int
  ) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the indices of the pairs and of the labelled responses of one update.

    Args:
      batch_size: pairs of an update; labelled responses without pairs.
      piece: the number of labelled responses beside pairs is a multiple of it.
      seed: seed of the order.
      step: update over all epochs, from 0.
    """
    leading = batch_indices(len(self.parts[0]), batch_size, seed, step)
    if self.pairs is None:
      return None, leading
    if self.steps is None:
      return leading, None
    count = count_beside_pairs(batch_size, len(self.pairs), len(self.steps), piece)
    return leading, endless_batch_indices(len(self.steps), count, seed, step)


def count_beside_pairs(batch_size: int, num_pairs: int, num_labelled: int, piece: int) -> int:
  """Returns the labelled responses of an update that has `batch_size` pairs of `num_pairs`."""
  share = batch_size * num_labelled / num_pairs
  return max(round(share / piece), 1) * piece


def _first(part: Any, count: int) -> Any:
  return None if part is None else select(part, np.arange(min(len(part), count)))
