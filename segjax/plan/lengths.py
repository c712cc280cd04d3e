"""Lengths of prompts and responses that the time of a plan is counted with.

No data set is read. `ultrafeedback` draws log-normal lengths with the medians and spreads of
UltraFeedback's prompts and of a chat model's answers to them: with limits of 1,024 tokens each, the
mean of both together is 582 of 2,048.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

KINDS = ('ultrafeedback', 'maximum')
# (median, standard deviation of the logarithm, least), in tokens.
_PROMPT = (130, 0.9, 20)
_RESPONSE = (330, 0.7, 5)


class TextLengths(NamedTuple):
  """Tokens of N responses and of their prompts; a prompt is repeated for each of its samples."""

  prompt: Int[np.ndarray, 'N']
  response: Int[np.ndarray, 'N']

  @property
  def total(self) -> Int[np.ndarray, 'N']:
    """Tokens of prompt and response together."""
    return self.prompt + self.response


def draw_lengths(
  kind: str, count: int, max_prompt: int, max_response: int, samples: int = 1
) -> TextLengths:
  """Draws lengths, the same in every call.

  Args:
    kind: one of `KINDS`; with 'maximum' all texts are as long as they may be.
    count: number of responses.
    max_prompt: limit of a prompt, in tokens.
    max_response: limit of a response.
    samples: responses to each prompt.
  """
  if kind == 'maximum':
    return TextLengths(np.full(count, max_prompt), np.full(count, max_response))
  rng = np.random.default_rng(0)
  prompt = np.repeat(_draw(rng, _PROMPT, count // samples, max_prompt), samples)
  return TextLengths(prompt, _draw(rng, _RESPONSE, count, max_response))


def _draw(
  rng: np.random.Generator, distribution: tuple[int, float, int], count: int, longest: int
) -> Int[np.ndarray, 'N']:
  median, spread, least = distribution
  return np.clip(rng.lognormal(np.log(median), spread, count), least, longest).astype(int)
