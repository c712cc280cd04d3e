"""Confidence intervals (Wilson, clustered, bootstrap) and the area under the ROC curve.

Plain numpy in float64. Wins are defined in `segjax.evaluation.win_rates`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

Z = 1.96  # half the width of a 95 % interval, in standard errors
NUM_DRAWS = 1000  # of a bootstrap
_BATCH = 100  # draws whose weights are in memory at the same time


def clustered_interval(
  values: Num[np.ndarray, 'N'], prompt: Int[np.ndarray, 'N']
) -> dict[str, float | int | None]:
  """Returns the mean over N responses and its 95 % interval, clustered by prompt.

  mean ± 1.96 · standard deviation of the prompts' means / √P

  Responses to the same prompt are not independent, so the prompts' means are the sample.

  Args:
    values: a value per response.
    prompt: the index of each response's prompt, 0 to P - 1.

  Returns:
    mean, low, high and n = N; low and high are None for a single prompt.
  """
  means = np.bincount(prompt, values) / np.bincount(prompt)
  estimate = {'mean': float(np.mean(values)), 'low': None, 'high': None, 'n': len(values)}
  if len(means) > 1:
    half = Z * float(np.std(means, ddof=1)) / len(means) ** 0.5
    estimate |= {'low': estimate['mean'] - half, 'high': estimate['mean'] + half}
  return estimate


def wilson(wins: float, total: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share, wins / total, after Wilson.

  Unlike mean ± 1.96 standard errors it stays in [0, 1] and has a width at shares of 0 and 1.

  (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)    with p = wins / n, n = total, z = 1.96

  See Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953. Without trials it is (0, 1).
  """
  if not total:
    return 0.0, 1.0
  p, square = wins / total, Z**2 / total
  half = Z * (p * (1 - p) / total + square / (4 * total)) ** 0.5
  low, high = ((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
  return max(0.0, low), min(1.0, high)


def resamples(clusters: int, seed: int, draws: int = NUM_DRAWS) -> Iterator[Int[np.ndarray, 'D C']]:
  """Yields the number of times that each of C clusters is in each draw of a bootstrap, in batches.

  Each draw takes C clusters with replacement; equal seeds give equal draws.
  """
  rng = np.random.default_rng(seed)
  for begin in range(0, draws, _BATCH):
    size = min(_BATCH, draws - begin)
    yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size)


def percentile_interval(
  mean: float | np.floating, draws: Float[np.ndarray, 'D'], n: int
) -> dict[str, float | int | None]:
  """Returns an estimate with the 2.5th and 97.5th percentile of its bootstrap draws.

  Draws that are NaN are left out. Percentiles of fewer than two draws are None, and so is an
  estimate that is not finite.
  """
  draws = draws[np.isfinite(draws)]
  low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) > 1 else (None, None)
  low, high = (None if x is None else float(x) for x in (low, high))
  mean = float(mean) if np.isfinite(mean) else None
  return {'mean': mean, 'low': low, 'high': high, 'n': n}


def format_interval(estimate: dict[str, Any], digits: int = 3) -> str:
  """Formats 'mean [low, high]' for a table; 'mean' without an interval, '' without a mean."""
  if estimate['mean'] is None:
    return ''
  if estimate['low'] is None:
    return f'{estimate["mean"]:z.{digits}f}'
  mean, low, high = (f'{estimate[name]:z.{digits}f}' for name in ('mean', 'low', 'high'))
  return f'{mean} [{low}, {high}]'


def bootstrap_mean(
  values: Num[np.ndarray, 'N'], cluster: Int[np.ndarray, 'N'], seed: int
) -> dict[str, float | int | None]:
  """Returns the mean of N values and its 95 % bootstrap interval, by resampling clusters.

  Args:
    values: the values to average.
    cluster: the cluster of each value, 0 to C - 1; a single cluster gives no interval.
    seed: seed of the draws.
  """
  total, count = np.bincount(cluster, values), np.bincount(cluster)
  if len(count) < 2:
    return percentile_interval(np.mean(values), np.zeros(0), len(values))
  draws = [(weight @ total) / (weight @ count) for weight in resamples(len(count), seed)]
  return percentile_interval(np.mean(values), np.concatenate(draws), len(values))


class RankedTokens(NamedTuple):
  """N rows to rank by score, each with a number of positive and of negative units.

  Attributes:
    score: larger where the row's units are more likely to be positive, [N].
    inside: number of positive units, those inside the spans sought, [N].
    outside: number of negative units, [N].
    cluster: the index of the row's response, 0 to C - 1, [N].
  """

  score: np.ndarray
  inside: np.ndarray
  outside: np.ndarray
  cluster: np.ndarray


def auc(rows: RankedTokens) -> float:
  """Returns the area under the ROC curve; NaN unless there are units of both kinds.

  P(score of a positive unit > score of a negative one) + P(both are equal) / 2

  0.5 for scores that are independent of the kind.
  """
  return float(_aucs(rows, np.ones((1, int(rows.cluster.max(initial=0)) + 1)))[0])


def auc_interval(rows: RankedTokens, seed: int) -> dict[str, float | int | None]:
  """Returns `auc` with its 95 % interval, by resampling responses; n is the number of responses."""
  _, cluster = np.unique(rows.cluster, return_inverse=True)
  rows = rows._replace(cluster=cluster)
  count = int(cluster.max(initial=-1)) + 1
  if count < 2:
    return percentile_interval(auc(rows), np.zeros(0), count)
  draws = [_aucs(rows, weight) for weight in resamples(count, seed)]
  return percentile_interval(auc(rows), np.concatenate(draws), count)


def auc_within(rows: RankedTokens, seed: int) -> dict[str, float | int | None]:
  """Returns the mean of `auc` within each response with units of both kinds, and its interval.

  Unlike `auc` it does not compare scores of different responses, whose level may differ.
  """
  aucs = []
  for cluster in np.unique(rows.cluster):
    is_member = rows.cluster == cluster
    members = RankedTokens(*(x[is_member] for x in rows))
    if members.inside.any() and members.outside.any():
      aucs.append(auc(members._replace(cluster=np.zeros(len(members.score), int))))
  if not aucs:
    return percentile_interval(np.nan, np.zeros(0), 0)
  return bootstrap_mean(np.array(aucs), np.arange(len(aucs)), seed)


def _aucs(rows: RankedTokens, weight: np.ndarray) -> np.ndarray:
  """Returns the AUC in which cluster c counts weight[d, c] times, for each draw d."""
  order = np.argsort(rows.score, kind='stable')
  score, inside, outside, cluster = (x[order] for x in rows)
  if not len(score):
    return np.full(len(weight), np.nan)
  first = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # of each group of equal scores
  aucs = np.full(len(weight), np.nan)
  for draw, by_cluster in enumerate(weight):
    by_row = by_cluster[cluster]
    positive = np.add.reduceat(inside * by_row, first)
    negative = np.add.reduceat(outside * by_row, first)
    pairs = float(positive.sum()) * float(negative.sum())
    if pairs:
      aucs[draw] = (positive * (np.cumsum(negative) - negative / 2)).sum() / pairs
  return aucs
