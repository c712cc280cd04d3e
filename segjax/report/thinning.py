"""Thins long series to as many points as a chart can show, and smooths them."""

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

MAX_POINTS = 500  # of a curve


def downsample(
  x: ArrayLike, y: ArrayLike, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most `max_points` points, in order, that keep every spike.

  The points are divided into max_points / 2 stretches, of each of which the lowest and the highest
  are kept. Points that are not finite are left out.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  finite = np.isfinite(y)
  x, y = x[finite], y[finite]
  if len(x) <= max_points:
    return x, y
  edges = np.linspace(0, len(x), max(max_points // 2, 1) + 1).astype(int)
  indices = set()
  for low, high in itertools.pairwise(edges):
    indices |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
  selected = sorted(indices)
  return x[selected], y[selected]


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
  """Returns the mean over `width` points around each point; over fewer at both ends."""
  total = np.concatenate([[0.0], np.cumsum(y)])
  index = np.arange(len(y))
  low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(y))
  return (total[high] - total[low]) / (high - low)


def rounded(values: ArrayLike, digits: int) -> list[float | None]:
  """Returns values with this many significant digits; None where JSON has no number for them."""
  values = np.asarray(values, float)
  return [float(f'{x:.{digits}g}') if math.isfinite(x) else None for x in values]
