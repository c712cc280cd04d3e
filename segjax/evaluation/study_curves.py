"""Gold reward at equal KL: curves over KL of one run, and of best-of-n sampling.

Policies of one KL coefficient are not at one KL, and gold reward rises and falls with it (Gao et
al. 2022, https://arxiv.org/abs/2210.10760), so that runs are compared at the same KL.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Curve:
  """Gold reward of P held-out prompts at K points of rising KL, the first one before training.

  Attributes:
    kl: nats per response, strictly rising, [K].
    gold: mean gold reward of each prompt's responses, [K, P].
  """

  kl: Float[np.ndarray, 'K']
  gold: Float[np.ndarray, 'K P']

  def at(self, level: float | int) -> Float[np.ndarray, 'P'] | None:
    """Returns the prompts' gold reward where KL first reached a level; None if it never did.

    Between two points it is linear in KL.
    """
    if not self.kl[0] <= level <= self.kl[-1]:
      return None
    return self._between(level)

  def area(self, level: float | int) -> float:
    """Returns ∫ gold dKL / level from 0 to a level: the mean gold reward on the way there.

    A curve that ends before goes on with its last value, which its policy can have at any larger
    budget of KL.
    """
    inner = self.kl[(self.kl > 0) & (self.kl < level)]
    kl = np.array([0.0, *inner, level])
    gold = np.array([self._between(x).mean() for x in kl])
    return float(np.sum((gold[1:] + gold[:-1]) / 2 * np.diff(kl)) / level)

  def _between(self, level: float | int) -> Float[np.ndarray, 'P']:
    """Returns the gold reward at a KL; that of the nearest end outside of the curve."""
    index = int(np.clip(np.searchsorted(self.kl, level), 1, max(len(self.kl) - 1, 1)))
    if len(self.kl) == 1:
      return self.gold[0]
    low, high = self.kl[index - 1], self.kl[index]
    share = min(1.0, max(0.0, (level - low) / (high - low)))
    return (1 - share) * self.gold[index - 1] + share * self.gold[index]


def first_reached(kl: Float[np.ndarray, 'N'], gold: Float[np.ndarray, 'N P']) -> Curve:
  """Returns the curve of a run: of its evaluations in order, those with a KL above all before.

  So that gold at a KL is that of the policy which reached it first. The first evaluation, before
  training, has KL 0 up to rounding.
  """
  kl = np.maximum(np.where(np.isfinite(kl), kl, -np.inf), 0.0)
  kl[0] = 0.0
  highest = np.maximum.accumulate(np.r_[-1.0, kl[:-1]])
  kept = kl > highest
  return Curve(kl[kept], gold[kept])


def best_of_n(
  score: Float[np.ndarray, 'R'],
  gold: Float[np.ndarray, 'R'],
  prompt: Int[np.ndarray, 'R'],
) -> Curve:
  """Returns gold reward over KL of the best of n = 1, 2, 4, ... responses by score.

  KL(n) = ln n - (n - 1) / n, in nats, an upper bound if several responses are the same (Beirami et
  al. 2024, https://arxiv.org/abs/2401.01879). The mean over all subsets of n out of a prompt's N
  responses, not over one draw:

  gold(n) = Σ_i gold_i C(i - 1, n - 1) / C(N, n)    with i = 1 ... N from the lowest score

  Args:
    score: by which the best response is chosen.
    gold: gold reward of each response.
    prompt: the index of its prompt, 0 to P - 1; every prompt has N responses.
  """
  num_prompts = int(prompt.max()) + 1
  size = len(prompt) // num_prompts
  counts = [2**k for k in range(size.bit_length()) if 2**k <= size]
  rows = []
  for n in counts:
    weight = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    means = []
    for index in range(num_prompts):
      is_member = prompt == index
      order = np.argsort(score[is_member], kind='stable')
      means.append(weight @ gold[is_member][order])
    rows.append(means)
  kl = np.array([math.log(n) - (n - 1) / n for n in counts])
  return Curve(kl, np.array(rows))
