"""Responses of every awkward kind, in one fixed shape so that each function compiles once."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

LENGTH = 16


class Batch(NamedTuple):
  """Numpy arrays [N, LENGTH], `finished` [N]."""

  mask: np.ndarray
  finished: np.ndarray
  entropy_after: np.ndarray  # of the distribution predicted AT t, for token t + 1
  entropy: np.ndarray  # the same, of the distribution that token t was drawn from
  score: np.ndarray
  value: np.ndarray

  def rows(self, *names):
    """The named fields as nested lists, one tuple per response."""
    return zip(*(getattr(self, name).tolist() for name in names), strict=True)


def from_previous(entropy_after):
  """Turns entropies of the next token into entropies of the token itself; the first is absurd."""
  first = np.full_like(entropy_after[..., :1], 99.0)
  return np.concatenate([first, entropy_after[..., :-1]], axis=-1)


def make_batch(seed, begin_anywhere=True):
  """Fixed edge cases, then random ones. Entropies often tie with the thresholds 0, 1.75 and 2."""
  rng = np.random.default_rng(seed)
  edges = [(0, 0, 0), (0, 1, 1), (0, 1, 0), (0, 2, 1), (0, LENGTH, 0), (0, LENGTH, 1)]
  if begin_anywhere:
    edges += [(3, 3, 1), (5, 6, 1), (LENGTH - 1, LENGTH, 0), (7, 9, 1), (4, LENGTH, 1)]
  while len(edges) < 48:
    begin = int(rng.integers(LENGTH)) if begin_anywhere else 0
    edges.append((begin, int(rng.integers(begin, LENGTH + 1)), int(rng.integers(2))))
  position = np.arange(LENGTH)
  mask = np.stack([(begin <= position) & (position < stop) for begin, stop, _ in edges])
  # Multiples of 1/4 are exact in float32.
  entropy_after = (rng.integers(0, 14, mask.shape) / 4).astype(np.float32)
  return Batch(
    mask=mask,
    finished=np.array([finished for *_, finished in edges], bool),
    entropy_after=entropy_after,
    entropy=from_previous(entropy_after),
    score=rng.normal(size=mask.shape).astype(np.float32),
    value=rng.normal(size=mask.shape).astype(np.float32),
  )


def padded(rows, dtype=np.float32):
  """Lists of unequal length as one array [N, LENGTH], zeros behind."""
  array = np.zeros((len(rows), LENGTH), dtype)
  for row, values in zip(array, rows, strict=True):
    row[: len(values)] = values
  return jnp.asarray(array)
