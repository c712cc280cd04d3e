"""Spreads and credits of `spreads` as slow loops over Python lists, the reference for their tests.

Positions are list indices. No jax here.
"""

import math

from segjax.rl import oracle


def entropy_weighted(z, ends, mask, entropy):
  """Each token of a segment gets z in proportion to its entropy, or evenly where all are 0."""
  begin, _ = oracle.run_of(mask)
  reward = [0.0] * len(mask)
  for z_j, (first, last) in zip(z, oracle.spans(ends, begin), strict=True):
    tokens = range(first, last + 1)
    total = sum(entropy[t] for t in tokens)
    for t in tokens:
      reward[t] = z_j * entropy[t] / total if total > 0 else z_j / len(tokens)
  return reward


def min_credit(z, temperature):
  """The z of each segment times its softmax weight among −z / T."""
  weights = [math.exp((min(z) - z_j) / temperature) for z_j in z]
  return [z_j * weight / sum(weights) for z_j, weight in zip(z, weights, strict=True)]
