"""Responses with their segments, entropies, scores and rewards, for display and JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segjax.data.sources import Message


@dataclasses.dataclass(frozen=True)
class Segment:
  """One segment of a response.

  Attributes:
    tokens: the text that each token adds, see `data.token_texts`; they join to `text`.
    entropy: entropy of the distribution that each token was drawn from, under the reference, nats;
      None where it is not finite.
    score: raw score of the reward model at the last token; None without a reward model.
    reward: in training, the sum of its tokens' rewards, KL penalty included; None elsewhere.
    normalized_score: the score after the normaliser, z; None in training and without a normaliser.
    parts: what each source of rewards adds to it, before KL and penalties, by name; None without
      config.rewards.
  """

  text: str
  tokens: list[str]
  entropy: list[float | None]
  score: float | None
  reward: float | None = None
  normalized_score: float | None = None
  parts: dict[str, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class AnnotatedResponse:
  """A response with its segments in order; the prompt is empty for plain text."""

  prompt: list[Message]
  response: str
  segments: list[Segment]

  def as_json(self) -> dict[str, Any]:
    """Returns all fields, for a line of JSON."""
    return dataclasses.asdict(self)


def make_segments(
  texts: Sequence[str],
  segment_id: np.ndarray,
  entropy: np.ndarray,
  score: np.ndarray | None,
  *,
  reward: ArrayLike | None = None,
  normalized_score: ArrayLike | None = None,
) -> list[Segment]:
  """Returns the S segments of a response of T tokens.

  Args:
    texts: the text that each token adds, [T].
    segment_id: the segment of each token, -1 outside, [T].
    entropy: nats, [T].
    score: raw scores, [T]; the score of a segment is that of its last token.
    reward: reward of each segment, [S].
    normalized_score: normalised score of each segment, [S].
  """
  segments = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    positions = np.flatnonzero(segment_id == index)
    tokens = [texts[i] for i in positions]
    segments.append(
      Segment(
        text=''.join(tokens),
        tokens=tokens,
        entropy=[to_number(x) for x in entropy[positions]],
        score=None if score is None else to_number(score[positions[-1]]),
        reward=None if reward is None else to_number(reward[index]),
        normalized_score=None if normalized_score is None else to_number(normalized_score[index]),
      )
    )
  return segments


def to_number(x: Any) -> float | None:
  """Rounds to four decimals; None where it is not finite, which JSON cannot express."""
  return round(float(x), 4) if np.isfinite(x) else None
