"""The choice of tokens of `learned_tokens` as a slow loop over Python lists. No jax here."""

import fractions
import math


def high_entropy_tokens(rows, masks, share):
  """Tokens whose entropy is at least that of the k-th largest, k = ⌈share · n⌉."""
  real = []
  for row, mask in zip(rows, masks, strict=True):
    real += [x for x, m in zip(row, mask, strict=True) if m]
  count = math.ceil(fractions.Fraction(str(share)) * len(real))
  threshold = sorted(real, reverse=True)[count - 1] if real else math.inf
  return [
    [bool(m) and x >= threshold for x, m in zip(row, mask, strict=True)]
    for row, mask in zip(rows, masks, strict=True)
  ]
