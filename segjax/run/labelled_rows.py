"""Counts the rows with labelled steps among pairs, for the dry run and the plan of reward training.

`data.pairs_and_steps` says what an update has of both.
"""

import functools
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from segjax.config.settings import Data, PairTraining
from segjax.data import files, row_forms
from segjax.data.pairs_and_steps import count_beside_pairs
from segjax.data.source_list import parse_sources
from segjax.errors import UserError
from segjax.model.mesh import batch_devices
from segjax.run import inputs

_MAX_ROWS = 1024  # that are read; of more, as many at equal distances


class RowForms(NamedTuple):
  """How many of the rows that were read are pairs, and how many have labelled steps.

  Attributes:
    read: the rows that were read; some may have neither form.
    rows: all rows of the data.
  """

  pairs: int
  labelled: int
  read: int
  rows: int

  def leading_rows(self, batch_size: int) -> int:
    """Returns how many rows decide the number of updates: pairs, or without any labelled rows.

    It is an estimate where not all rows were read, and then at least `batch_size`.
    """
    of_read = self.pairs or self.labelled
    estimate = round(of_read * self.rows / max(self.read, 1))
    return of_read if self.read == self.rows else max(estimate, batch_size)

  def labelled_in_update(self, batch_size: int, piece: int = 1) -> int:
    """Returns how many labelled responses an update has, see `PairsAndSteps.batch_rows`."""
    if not self.labelled:
      return 0
    if not self.pairs:
      return batch_size
    return count_beside_pairs(batch_size, self.pairs, self.labelled, piece)

  def describe(self, batch_size: int, piece: int = 1) -> str:
    """Returns what rows and updates have of each form as a sentence; '' without labelled steps."""
    if not self.labelled:
      return ''
    of_all = '' if self.read == self.rows else f', at equal distances in {self.rows:,},'
    count = self.labelled_in_update(batch_size, piece)
    pairs = f'{batch_size} pairs and ' if self.pairs else ''
    about = 'about ' if of_all and self.pairs else ''
    return (
      f'{self.labelled:,} of {self.read:,} rows{of_all} have labelled steps: an update has '
      f'{pairs}{about}{count} responses with labelled steps'
    )


def labelled_at_once(settings: PairTraining, mesh: Mesh) -> int:
  """Returns the rows of a piece, of which the labelled responses beside pairs are a multiple."""
  is_split = settings.micro_batch_size and not (
    settings.packing_length or settings.micro_batch_tokens
  )
  return settings.micro_batch_size if is_split else batch_devices(mesh)


def count_forms(data: Data) -> RowForms | None:
  """Returns the forms of the rows of config.data; None if they are not local or cannot be opened.

  A row that cannot be read has no form; what is wrong with it is for the job to say.
  """
  paths = [epath.Path(source.path).expanduser() for source in parse_sources(data.path)]
  if not paths or not all(path.exists() for path in paths):
    return None
  try:
    return _count(data, tuple(stamp for path in paths for stamp in files.stamps(path)))
  except (UserError, OSError):
    return None


@functools.lru_cache(maxsize=4)
def _count(data: Data, stamps: tuple[files.Stamp, ...]) -> RowForms:
  """Returns the forms of rows; `stamps` tell other contents of the files."""
  rows = inputs.load_config_rows(data)
  indices = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).astype(int))
  pairs = labelled = 0
  for index in indices:
    try:
      row = rows[int(index)]
    except UserError:
      continue
    labelled += row_forms.is_labelled(row)
    pairs += row_forms.is_pair(row)
  return RowForms(pairs, labelled, len(indices), len(rows))
