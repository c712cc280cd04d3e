"""The loss of labelled steps as a slow loop over Python lists, for tests. No jax here."""

import math


def step_label_loss(scores, labels, count):
  """−Σ (y ln σ(s) + (1 − y) ln σ(−s)) / count over the tokens whose label is not None."""
  total = 0.0
  for row_scores, row_labels in zip(scores, labels, strict=True):
    for score, label in zip(row_scores, row_labels, strict=True):
      if label is not None:
        good = 1 / (1 + math.exp(-score))
        total -= label * math.log(good) + (1 - label) * math.log(1 - good)
  return total / max(count, 1)
