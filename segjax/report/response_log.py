"""Responses as a run keeps them: cut into segments, with what each token and segment was given.

A stage's `samples.jsonl` is read by `report.response_data`. Which responses are shown is not
decided here.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from segjax import processes
from segjax.config.settings import Report
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.storage import truncate_json_lines
from segjax.train.experience import take_rows
from segjax.types import Experience

FILE = 'samples.jsonl'

_CHARACTER = 4  # bytes, and so tokens, that a character has at most


@dataclasses.dataclass(frozen=True)
class Segment:
  """One segment of a response.

  Attributes:
    tokens: the text that each token adds; their sum is `text`.
    entropy: of the distribution that each token was drawn from, under the model that cuts, nats;
      None where it is not finite.
    score: the reward model's, raw, at the last token; None without a reward model.
    reward: in training what its tokens earned in all, KL penalty included; of a text that is only
      read the score, normalised. None where it is not known.
  """

  text: str
  tokens: list[str]
  entropy: list[float | None]
  score: float | None
  reward: float | None


@dataclasses.dataclass(frozen=True)
class AnnotatedResponse:
  """A response, its segments in order; `prompt` is what it answers, empty for plain text."""

  prompt: list[Message]
  response: str
  segments: list[Segment]

  def as_json(self) -> dict[str, Any]:
    """All of it, for a line of JSON."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ResponseRecord:
  """A response of a run.

  Attributes:
    step: of training, after which the model spoke.
    model: who spoke.
    totals: of the response: reward, kl (nats), length (tokens), finished; gold where it is known.
    threshold: nats above which a segment begins; None where entropy does not cut.
    pair: a number that responses to be compared have in common; None for none.
  """

  step: int
  model: str
  prompt: list[Message]
  segments: list[Segment]
  totals: dict[str, Any]
  threshold: float | None = None
  pair: int | None = None


class ResponseLog:
  """Keeps some responses of a stage in its directory, each with what it earned.

  Every process must call `take` alike; the first writes. A step that is run again after a restart
  takes the place of what it left before.
  """

  def __init__(
    self,
    directory: Path,
    settings: Report,
    tokenizer: ChatTokenizer,
    messages: Callable[[int], list[Message]],
    *,
    has_score: bool = True,
    threshold: float | None = None,
  ):
    self._path = directory / FILE
    self._settings, self._tokenizer, self._messages = settings, tokenizer, messages
    self._has_score, self._threshold = has_score, threshold
    self._is_open = False

  def take(self, step: int, total: int, experience: Experience, rows: ArrayLike) -> None:
    """Every report.every_steps steps, and at the last: report.responses_per_rollout of a rollout,
    evenly chosen.

    Args:
      rows: which prompt each response answers, [B].
    """
    every = self._settings.every_steps
    self._open(step)
    if not every or (step % every and step + 1 < total):
      return
    count = min(self._settings.responses_per_rollout, len(rows))
    chosen = np.linspace(0, len(rows) - 1, count).astype(np.int32)
    # Rows are split over the devices, so as many are taken as these divide.
    padded = np.resize(chosen, -(-count // jax.device_count()) * jax.device_count())
    found = processes.to_host(take_rows(experience, padded))
    self.write(step, 'policy', found, np.asarray(rows)[chosen])

  def write(
    self,
    step: int,
    model: str,
    found: Experience,
    rows: ArrayLike,
    pairs: ArrayLike | None = None,
    gold: ArrayLike | None = None,
  ) -> None:
    """Appends responses whose arrays are on the host; `pairs` and `gold` are those of `Sample`."""
    self._open(step)
    if not processes.is_first():
      return
    with self._path.open('a', encoding='utf-8') as out:
      for i, row in enumerate(rows):
        segments, totals = of_experience(found, i, self._tokenizer, has_score=self._has_score)
        if gold is not None:
          totals['gold'] = float(gold[i])
        pair = None if pairs is None else int(pairs[i])
        prompt = self._messages(row)
        sample = ResponseRecord(step, model, prompt, segments, totals, self._threshold, pair)
        out.write(json.dumps(dataclasses.asdict(sample)) + '\n')

  def _open(self, step: int) -> None:
    if not self._is_open and processes.is_first():
      self._path.parent.mkdir(parents=True, exist_ok=True)
      truncate_json_lines(self._path, step)
    self._is_open = True


def of_experience(
  found: Experience, row: int, tokenizer: ChatTokenizer, *, has_score: bool
) -> tuple[list[Segment], dict[str, Any]]:
  """(segments, totals) of a response, [T] in `row` of arrays on the host."""
  rollout = found.rollout
  mask = np.asarray(rollout.response_mask[row], bool)
  ids = np.asarray(rollout.response_ids[row])[mask].tolist()
  arrays = (found.entropy, found.score, found.reward, found.segments.segment_id)
  entropy, score, reward, segment_id = (np.asarray(x[row])[mask] for x in arrays)
  difference = np.asarray(rollout.old_logprob[row] - found.ref_logprob[row])[mask]
  totals = {
    'reward': _number(reward.sum()),
    'kl': _number(difference.sum()),
    'length': len(ids),
    'finished': bool(rollout.finished[row]),
  }
  count = int(segment_id.max(initial=-1)) + 1
  earned = [float(reward[segment_id == index].sum()) for index in range(count)]
  texts = token_texts(ids, tokenizer)
  return segments_of(texts, segment_id, entropy, score if has_score else None, earned), totals


def segments_of(
  texts: Sequence[str],
  segment_id: np.ndarray,
  entropy: np.ndarray,
  score: np.ndarray | None,
  reward: ArrayLike | None,
) -> list[Segment]:
  """The segments of a response of T tokens.

  Args:
    texts: what each token adds to the text, [T].
    segment_id: the segment of each token, -1 outside, [T].
    entropy: nats, [T].
    score: raw, [T]; that of a segment stands at its last token.
    reward: of each segment, in their order.
  """
  found = []
  for index in range(int(segment_id.max(initial=-1)) + 1):
    at = np.flatnonzero(segment_id == index)
    tokens = [texts[i] for i in at]
    found.append(
      Segment(
        text=''.join(tokens),
        tokens=tokens,
        entropy=[_number(x) for x in entropy[at]],
        score=None if score is None else _number(score[at[-1]]),
        reward=None if reward is None else _number(reward[index]),
      )
    )
  return found


def token_texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
  """What each token adds to the text; special tokens are written out.

  A token that is a part of a character adds nothing, and the last of them the character. Each is
  read after the one before it, for by itself it may lose the space it begins with.
  """

  def decode(some: Sequence[int]) -> str:
    return tokenizer.decode(some, skip_special=False)

  found, begin, read = [], 0, 0
  for end in range(1, len(ids) + 1):
    text = decode(ids[begin:end])
    is_part = text.endswith('\N{REPLACEMENT CHARACTER}')
    if is_part and end < len(ids) and end - read < _CHARACTER:
      found.append('')
      continue
    found.append(text[len(decode(ids[begin:read])) :])
    begin, read = read, end
  return found


def _number(x: Any) -> float | None:
  """Four decimals; None where it is not finite, for which JSON has no word."""
  return round(float(x), 4) if np.isfinite(x) else None
