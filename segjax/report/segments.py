"""A response as a person reads it: its segments, one a line, each with its reward."""

from collections.abc import Callable, Sequence

import numpy as np


def render(
  ids: np.ndarray,
  segment_id: np.ndarray,
  reward: np.ndarray,
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """One line per segment, 'reward  text'.

  Args:
    ids: the response's tokens, [T].
    segment_id: the segment of each token, -1 outside, [T].
    reward: per token, [T]; a line shows the sum over its segment.
    decode: token ids to text.
  """
  lines = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    inside = segment_id == index
    lines.append(f'{reward[inside].sum():+6.2f}  {decode(ids[inside].tolist()).strip()}')
  return lines
