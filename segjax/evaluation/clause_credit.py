"""The credit that dense rewards give to the clauses of responses, beside the true credit.

A clause is a part of a response that config.evaluate.boundary_fn ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from segjax.evaluation.credit_accuracy import ClauseCredit, Estimate, credit_accuracy, share_on
from segjax.types import Rollout


class Clauses(NamedTuple):
  """The clauses of R responses, N of them.

  Attributes:
    of_token: clause of each token of a response, counted over all responses; -1 outside. A stop
      token belongs to the last clause.
    ends: True on the last token of each clause, where its worth is decided.
    truth: true credit.
    response: index of the clause's response.
  """

  of_token: Int[np.ndarray, 'R T']
  ends: Bool[np.ndarray, 'R T']
  truth: Float[np.ndarray, 'N']
  response: Int[np.ndarray, 'N']


def clause_ends(
  rollout: Rollout, decode: Callable[[Any], str], is_boundary: Callable[[str], bool]
) -> Bool[np.ndarray, 'R T']:
  """Returns where clauses end: the last token of a response, without its stop token, ends one.

  Args:
    rollout: arrays on the host.
    decode: maps token ids to text, without special tokens.
    is_boundary: of a token's text, whether a clause ends there.
  """
  ids, mask = rollout.response_ids, rollout.response_mask
  rows, content = np.arange(len(ids)), mask.copy()
  content[rows, mask.sum(1) - 1] &= ~rollout.finished
  is_end = {i: is_boundary(decode([i])) for i in np.unique(ids[content])}
  ends = np.vectorize(is_end.get, otypes=[bool])(ids) & content
  size = content.sum(1)
  ends[rows[size > 0], size[size > 0] - 1] = True
  return ends


def make_clauses(
  response_mask: Bool[np.ndarray, 'R T'],
  ends: Bool[np.ndarray, 'R T'],
  credit: Sequence[Sequence[float]],
) -> Clauses:
  """Returns the clauses whose true credit is known.

  Args:
    response_mask: True on responses, stop tokens included.
    ends: see `clause_ends`.
    credit: true credit of each clause of each response; [] where it is not known.
  """
  of_token = np.full(ends.shape, -1)
  truth, response = [], []
  for row, values in enumerate(credit):
    if len(values):
      index = np.minimum(np.cumsum(ends[row]) - ends[row], len(values) - 1)
      of_token[row] = np.where(response_mask[row], len(truth) + index, -1)
      truth += values
      response += [row] * len(values)
  is_known = np.array([len(values) > 0 for values in credit])
  ends = ends & is_known[:, None]
  return Clauses(of_token, ends, np.array(truth, float), np.array(response, int))


def clause_figures(
  reward: Float[np.ndarray, 'R T'], clauses: Clauses, seed: int
) -> dict[str, Estimate]:
  """Returns how well a method's rewards, and advantages, agree with the true credit.

  The credit of a clause is the sum of its tokens' rewards, and as an advantage the mean over its
  tokens of the return to go, Σ_{s ≥ t} reward_s: that of GAE with λ = 1 and no critic.

  Returns:
    `credit_accuracy` of the rewards, the same of the return to go under advantage_NAME, and
    on_deciding_token, the share of Σ|reward| on the last tokens of clauses.
  """
  inside = clauses.of_token >= 0
  index, count = clauses.of_token[inside], len(clauses.truth)
  to_go = reward[:, ::-1].cumsum(1)[:, ::-1]
  total, mean = (np.bincount(index, x[inside], count) for x in (reward, to_go))
  size = np.bincount(index, minlength=count)
  of_reward = credit_accuracy(ClauseCredit(total, clauses.truth, clauses.response), seed)
  of_advantage = credit_accuracy(
    ClauseCredit(mean / np.maximum(size, 1), clauses.truth, clauses.response), seed
  )
  return {
    **of_reward,
    'on_deciding_token': share_on(np.where(inside, reward, 0), clauses.ends, seed),
    **{f'advantage_{name}': value for name, value in of_advantage.items()},
  }
