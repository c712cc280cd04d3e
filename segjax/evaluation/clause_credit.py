"""The credit that dense rewards give to the clauses of responses, beside the true credit.

A clause is a part of a response that config.evaluate.boundary_fn ends; what it is truly worth is
said by config.evaluate.credit_fn.
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


def find_clauses(
  prompts: Sequence[str],
  rollout: Rollout,
  decode: Callable[[Any], str],
  is_boundary: Callable[[str], bool],
  true_credit: Callable[[str, str], list[float]],
) -> Clauses:
  """Returns the clauses of a rollout whose true credit is known.

  Args:
    prompts: of each response.
    rollout: arrays on the host.
    decode: maps token ids to text, without special tokens.
    is_boundary: of a token's text, whether a clause ends there.
    true_credit: of (prompt, response), the credit of each clause; [] where it is not known.
  """
  ids, mask = rollout.response_ids, rollout.response_mask
  content = mask.copy()
  content[np.arange(len(ids)), mask.sum(1) - 1] &= ~rollout.finished
  is_end = {i: is_boundary(decode([i])) for i in np.unique(ids[content])}
  of_token, ends = np.full(ids.shape, -1), np.zeros(ids.shape, bool)
  truth, response = [], []
  for row, prompt in enumerate(prompts):
    size = int(content[row].sum())
    credit = true_credit(prompt, decode(ids[row][mask[row]])) if size else []
    if not credit:
      continue
    ends[row, :size] = [is_end[i] for i in ids[row, :size]]
    ends[row, size - 1] = True
    index = np.cumsum(ends[row]) - ends[row]
    of_token[row] = np.where(mask[row], len(truth) + np.minimum(index, len(credit) - 1), -1)
    truth += credit
    response += [row] * len(credit)
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
