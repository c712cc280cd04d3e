"""How much responses repeat themselves and one another, in n-grams of tokens."""

from collections.abc import Sequence

import numpy as np

Tokens = Sequence[int] | np.ndarray  # of one response


def repeated_share(tokens: Tokens, n: int = 4) -> float | None:
  """1 - distinct n-grams / n-grams of one response; None if it is too short to have any.

  As seq-rep-n of Welleck et al. 2019, https://arxiv.org/abs/1908.04319: 0 where none comes twice.
  """
  grams = _ngrams(tokens, n)
  return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(responses: Sequence[Tokens], n: int) -> float:
  """Distinct n-grams / n-grams over all responses; 0 without any.

  Li et al. 2016, https://arxiv.org/abs/1510.03055. It falls as there is more text: compare models
  on the same prompts and at a like length.
  """
  grams = [gram for tokens in responses for gram in _ngrams(tokens, n)]
  return len(set(grams)) / max(len(grams), 1)


def figures(responses: Sequence[Tokens]) -> dict[str, float]:
  """Mean `repeated_share` of 4-grams where a response has any, and `distinct` of 1- and 2-grams."""
  shares = [share for share in map(repeated_share, responses) if share is not None]
  return {
    'repeated_4grams': float(np.mean(shares)) if shares else 0.0,
    'distinct_1': distinct(responses, 1),
    'distinct_2': distinct(responses, 2),
  }


def _ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
  tokens = [int(token) for token in tokens]
  return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
