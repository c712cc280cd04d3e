"""Estimators of advantages as slow loops over Python lists, as in `oracle`. No jax here."""

import itertools
import math


def border_gae(reward, value, action_start, mask, gamma, gae_lambda):
  """A_t as a sum of the TD errors to come, each times the γ and λ on the way to it."""
  real = [t for t, is_real in enumerate(mask) if is_real]
  following = dict(itertools.pairwise(real))
  delta = {
    t: reward[t] + (gamma * value[following[t]] if t in following else 0.0) - value[t] for t in real
  }
  advantage = [0.0] * len(mask)
  for k, t in enumerate(real):
    weight = 1.0
    for later in real[k:]:
      if later != t:
        weight *= gamma * (gae_lambda if action_start[later] else 1.0)
      advantage[t] += weight * delta[later]
  return advantage


def return_to_go(reward, mask, gamma):
  """Discounted sum of the rewards from each masked token on."""
  real = [t for t, is_real in enumerate(mask) if is_real]
  to_go = [0.0] * len(mask)
  for k, t in enumerate(real):
    to_go[t] = sum(gamma**n * reward[later] for n, later in enumerate(real[k:]))
  return to_go


def leave_one_out(rewards, masks, gamma):
  """Returns to go, less the mean of the others' at the same index or at their last token before."""
  rows = [return_to_go(*row, gamma) for row in zip(rewards, masks, strict=True)]
  advantages = [[0.0] * len(mask) for mask in masks]
  for i, mask in enumerate(masks):
    for t, is_real in enumerate(mask):
      if not is_real:
        continue
      others = []
      for j, other in enumerate(rows):
        if j != i:
          before = [s for s in range(t + 1) if masks[j][s]]
          others.append(other[before[-1]] if before else 0.0)
      advantages[i][t] = rows[i][t] - sum(others) / len(others)
  return advantages


def group_norm(rewards, action_starts, masks, gamma, divides=True):
  """Sums of the actions' rewards to come, normalised over all actions of the group."""
  actions = []  # of each response, its actions as lists of tokens
  for start, mask in zip(action_starts, masks, strict=True):
    actions.append([])
    for t, is_real in enumerate(mask):
      if is_real and (start[t] or not actions[-1]):
        actions[-1].append([t])
      elif is_real:
        actions[-1][-1].append(t)
  totals = [
    [sum(reward[t] for t in action) for action in row]
    for reward, row in zip(rewards, actions, strict=True)
  ]
  values = [x for row in totals for x in row]
  mean = sum(values) / max(len(values), 1)
  variance = sum((x - mean) ** 2 for x in values) / max(len(values), 1)
  scale = math.sqrt(max(variance, 1e-8)) if divides else 1.0
  advantages = [[0.0] * len(mask) for mask in masks]
  for advantage, row, total in zip(advantages, actions, totals, strict=True):
    for k, action in enumerate(row):
      for t in action:
        advantage[t] = sum(gamma**n * (x - mean) / scale for n, x in enumerate(total[k:]))
  return advantages
