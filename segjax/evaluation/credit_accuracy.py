"""How well a method's credit of the clauses of responses agrees with their true credit.

Plain numpy in float64, over N clauses of R responses; intervals are 95 %, by resampling responses.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from segjax.evaluation.intervals import bootstrap_mean, percentile_interval, resamples

Estimate = dict[str, float | int | None]


class ClauseCredit(NamedTuple):
  """The credit of clauses, arrays [N].

  Attributes:
    credit: that a method gives.
    truth: the true credit.
    response: index of the clause's response.
  """

  credit: Float[np.ndarray, 'N']
  truth: Float[np.ndarray, 'N']
  response: Int[np.ndarray, 'N']


def credit_accuracy(clauses: ClauseCredit, seed: int) -> dict[str, Estimate]:
  """Returns three measures of agreement.

  spearman: mean over responses of Spearman's rank correlation of credit and truth; responses whose
    truth is constant are left out, and a constant credit counts 0.
  sign: share of clauses whose credit has the sign of the truth; a credit of 0 counts half.
  error: min_a √Σ(a credit - truth)² / √Σ truth², after the best scaling: 0 is perfect, 1 is what a
    credit of 0 has.

  Args:
    clauses: the clauses.
    seed: of the draws.
  """
  credit, truth, response = clauses
  agrees = np.where(credit == 0, 0.5, np.sign(credit) == np.sign(truth))
  _, response = np.unique(response, return_inverse=True)
  parts = [np.bincount(response, x) for x in (credit * truth, credit**2, truth**2)]

  def error(weight):
    both, own, true = (weight @ part for part in parts)
    explained = np.divide(both**2, own * true, out=np.zeros_like(both), where=own * true > 0)
    return np.sqrt(np.maximum(1 - explained, 0))

  count = len(parts[0])
  draws = np.concatenate([error(weight) for weight in resamples(count, seed)])
  return {
    'spearman': _within_responses(credit, truth, response, seed),
    'sign': bootstrap_mean(agrees, response, seed),
    'error': percentile_interval(error(np.ones((1, count)))[0], draws, count),
  }


def share_on(credit: Float[np.ndarray, 'R T'], is_deciding: Any, seed: int) -> Estimate:
  """Returns the share of Σ|credit| that lies on the deciding tokens, over all responses.

  Args:
    credit: of each token, 0 outside the responses.
    is_deciding: bool[R, T].
    seed: of the draws.
  """
  size = np.abs(credit).sum(1)
  deciding = np.where(is_deciding, np.abs(credit), 0).sum(1)
  if not size.sum():
    return percentile_interval(np.nan, np.zeros(0), len(size))
  draws = [(weight @ deciding) / (weight @ size) for weight in resamples(len(size), seed)]
  return percentile_interval(deciding.sum() / size.sum(), np.concatenate(draws), len(size))


def _within_responses(credit, truth, response, seed) -> Estimate:
  from scipy.stats import rankdata  # imported here: it takes half a second

  values = []
  for index in range(int(response.max(initial=-1)) + 1):
    is_member = response == index
    ranks = [rankdata(x[is_member]) for x in (credit, truth)]
    ranks = [rank - rank.mean() for rank in ranks]
    sizes = [float(rank @ rank) for rank in ranks]
    if sizes[1]:
      values.append(float(ranks[0] @ ranks[1]) / (sizes[0] * sizes[1]) ** 0.5 if sizes[0] else 0.0)
  if not values:
    return percentile_interval(np.nan, np.zeros(0), 0)
  return bootstrap_mean(np.array(values), np.arange(len(values)), seed)
