"""Intervals of what is measured (Wilson, clusters, bootstrap) and the area under the ROC curve.

Not here: what a win is, which is `segjax.evaluation.win_rates`'. Plain numpy, in float64.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

Z = 1.96  # half the width of a 95 % interval, in standard errors
DRAWS = 1000  # of a bootstrap
_AT_ONCE = 100  # draws whose weights exist together


def clustered_interval(
  values: Num[np.ndarray, 'N'], prompt: Int[np.ndarray, 'N']
) -> dict[str, float | int | None]:
  """Mean and 95 % interval over responses, in clusters by prompt; one prompt gives no interval.

  Responses to one prompt are not independent: the standard error is that of the prompts' means.

  Args:
    values: one per response.
    prompt: the index of each response's prompt, 0 to P - 1.
  """
  means = np.bincount(prompt, values) / np.bincount(prompt)
  found = {'mean': float(np.mean(values)), 'low': None, 'high': None, 'n': len(values)}
  if len(means) > 1:
    half = Z * float(np.std(means, ddof=1)) / len(means) ** 0.5
    found |= {'low': found['mean'] - half, 'high': found['mean'] + half}
  return found


def wilson(wins: float, total: int) -> tuple[float, float]:
  """95 % interval of a share, wins / total; it stays in [0, 1] and is not empty at its ends.

  (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)    with p = wins / n, n = total, z = 1.96

  See Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953. Without trials it is (0, 1).
  """
  if not total:
    return 0.0, 1.0
  p, square = wins / total, Z**2 / total
  half = Z * (p * (1 - p) / total + square / (4 * total)) ** 0.5
  low, high = ((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
  return max(0.0, low), min(1.0, high)


def resamples(clusters: int, seed: int, draws: int = DRAWS) -> Iterator[Int[np.ndarray, 'D C']]:
  """How often each cluster is in each draw of a bootstrap, some draws at a time.

  Each draw takes as many clusters as there are, with replacement; equal seeds give equal draws.
  """
  rng = np.random.default_rng(seed)
  for begin in range(0, draws, _AT_ONCE):
    size = min(_AT_ONCE, draws - begin)
    yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size)


def percentiles(
  mean: float | np.floating, draws: Float[np.ndarray, 'D'], n: int
) -> dict[str, float | int | None]:
  """An estimate with the 2.5th and 97.5th percentile of its bootstrap; NaN among these is left out.

  None for both where fewer than two draws are numbers, and for an estimate that is none.
  """
  draws = draws[np.isfinite(draws)]
  low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) > 1 else (None, None)
  as_float = [None if x is None else float(x) for x in (low, high)]
  mean = float(mean) if np.isfinite(mean) else None
  return {'mean': mean, 'low': as_float[0], 'high': as_float[1], 'n': n}


def format_interval(estimate: dict[str, Any], digits: int = 3) -> str:
  """'mean [low, high]' for a table; the mean alone without an interval, '' where there is none."""
  if estimate['mean'] is None:
    return ''
  if estimate['low'] is None:
    return f'{estimate["mean"]:z.{digits}f}'
  mean, low, high = (f'{estimate[name]:z.{digits}f}' for name in ('mean', 'low', 'high'))
  return f'{mean} [{low}, {high}]'


def bootstrap_mean(
  values: Num[np.ndarray, 'N'], cluster: Int[np.ndarray, 'N'], seed: int
) -> dict[str, float | int | None]:
  """Mean over all values and its 95 % interval, by resampling whole clusters.

  Args:
    values: what is averaged.
    cluster: which cluster each is of, 0 to C - 1. A single cluster gives no interval.
    seed: of the draws.
  """
  total, count = np.bincount(cluster, values), np.bincount(cluster)
  if len(count) < 2:
    return percentiles(np.mean(values), np.zeros(0), len(values))
  draws = [(weight @ total) / (weight @ count) for weight in resamples(len(count), seed)]
  return percentiles(np.mean(values), np.concatenate(draws), len(values))


class RankedTokens(NamedTuple):
  """Rows with a score, each standing for units in and outside of what is to be found.

  Attributes:
    score: the larger, the surer that the row's units are inside, [N].
    inside: how many of its units are, [N].
    outside: how many are not, [N].
    cluster: the response that the row is of, 0 to C - 1, [N].
  """

  score: np.ndarray
  inside: np.ndarray
  outside: np.ndarray
  cluster: np.ndarray


def auc(rows: RankedTokens) -> float:
  """P(score of a unit inside > score of one outside) + P(they are equal) / 2; NaN without either.

  The area under the ROC curve. 0.5 for scores that know nothing.
  """
  return float(_aucs(rows, np.ones((1, int(rows.cluster.max(initial=0)) + 1)))[0])


def auc_interval(rows: RankedTokens, seed: int) -> dict[str, float | int | None]:
  """`auc` with its 95 % interval, by resampling whole responses; n is that of responses."""
  _, cluster = np.unique(rows.cluster, return_inverse=True)
  rows = rows._replace(cluster=cluster)
  count = int(cluster.max(initial=-1)) + 1
  if count < 2:
    return percentiles(auc(rows), np.zeros(0), count)
  draws = [_aucs(rows, weight) for weight in resamples(count, seed)]
  return percentiles(auc(rows), np.concatenate(draws), count)


def auc_within(rows: RankedTokens, seed: int) -> dict[str, float | int | None]:
  """Mean of the `auc` within each response that has units of both kinds, with its interval.

  Unlike `auc` it asks nothing of the scores across responses, whose level may differ.
  """
  found = []
  for cluster in np.unique(rows.cluster):
    at = rows.cluster == cluster
    one = RankedTokens(*(x[at] for x in rows))._replace(cluster=np.zeros(at.sum(), int))
    if one.inside.any() and one.outside.any():
      found.append(auc(one))
  if not found:
    return percentiles(np.nan, np.zeros(0), 0)
  return bootstrap_mean(np.array(found), np.arange(len(found)), seed)


def _aucs(rows: RankedTokens, weight: np.ndarray) -> np.ndarray:
  """The AUC where cluster c counts weight[d, c] times, for each d."""
  order = np.argsort(rows.score, kind='stable')
  score, inside, outside, cluster = (x[order] for x in rows)
  if not len(score):
    return np.full(len(weight), np.nan)
  first = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # of each run of equal scores
  found = np.full(len(weight), np.nan)
  for draw, by_cluster in enumerate(weight):
    by_row = by_cluster[cluster]
    hit = np.add.reduceat(inside * by_row, first)
    miss = np.add.reduceat(outside * by_row, first)
    pairs = float(hit.sum()) * float(miss.sum())
    if pairs:
      found[draw] = (hit * (np.cumsum(miss) - miss / 2)).sum() / pairs
  return found
