"""Measures how much responses repeat themselves and each other, in n-grams of tokens."""

from collections.abc import Sequence

import numpy as np

Tokens = Sequence[int] | np.ndarray  # of a response


def repeated_share(tokens: Tokens, n: int = 4) -> float | None:
  """Returns 1 - distinct n-grams / n-grams of a response; None if it has fewer than n tokens.

  seq-rep-n of Welleck et al. 2019, https://arxiv.org/abs/1908.04319. 0 if no n-gram is repeated.
  """
  grams = _ngrams(tokens, n)
  return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(responses: Sequence[Tokens], n: int) -> float:
  """Returns distinct n-grams / n-grams over all responses; 0 without any.

  distinct-n of Li et al. 2016, https://arxiv.org/abs/1510.03055. It falls with the amount of text:
  compare models on the same prompts and at a similar length.
  """
  grams = [gram for tokens in responses for gram in _ngrams(tokens, n)]
  return len(set(grams)) / max(len(grams), 1)


def repetition_metrics(responses: Sequence[Tokens]) -> dict[str, float]:
  """Returns `distinct` of 1- and 2-grams, and the mean `repeated_share` of 4-grams.

  Responses without 4-grams do not count in the latter.
  """
  shares = [share for share in map(repeated_share, responses) if share is not None]
  return {
    'repeated_4grams': float(np.mean(shares)) if shares else 0.0,
    'distinct_1': distinct(responses, 1),
    'distinct_2': distinct(responses, 2),
  }


def _ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
  tokens = [int(token) for token in tokens]
  return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
