"""Logs responses of a run as segments, with the numbers of each token and segment.

A stage's `samples.jsonl` is read by `report.response_data`, which decides what is shown.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from segjax import processes
from segjax.config.settings import Report
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation.segment_records import Segment, make_segments, to_number
from segjax.storage import (
  make_directory,
  truncate_json_lines,
  write_text_atomically,
  writing,
)
from segjax.train.rollout_rows import take_rows
from segjax.types import Experience

RESPONSES_FILE = 'samples.jsonl'


@dataclasses.dataclass(frozen=True)
class ResponseRecord:
  """A response of a run.

  Attributes:
    step: the training step whose policy wrote the response.
    model: name of the model that wrote it.
    totals: of the response: reward, kl (nats), length (tokens), finished, and, where there are
      any, gold and the parts of the reward by name.
    threshold: nats above which a segment begins; None if boundaries are not by entropy.
    pair: a number shared by the responses to compare with each other; None without any.
  """

  step: int
  model: str
  prompt: list[Message]
  segments: list[Segment]
  totals: dict[str, Any]
  threshold: float | None = None
  pair: int | None = None


class ResponseLog:
  """Writes some responses of a stage to its samples.jsonl, with their rewards.

  Every process must call `take` with the same arguments; the first writes. A step that is repeated
  after a restart replaces the records that it wrote before.
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
    self._path = directory / RESPONSES_FILE
    self._settings, self._tokenizer, self._messages = settings, tokenizer, messages
    self._has_score, self._threshold = has_score, threshold
    self._is_open = False

  def take(self, step: int, total: int, experience: Experience, rows: ArrayLike) -> None:
    """Logs responses of a rollout, evenly spaced, every report.every_steps steps and at the last.

    Args:
      total: number of steps.
      rows: the index of each response's prompt, [B].
    """
    every = self._settings.every_steps
    self._open(step)
    if not every or (step % every and step + 1 < total):
      return
    count = min(self._settings.responses_per_rollout, len(rows))
    selected = np.linspace(0, len(rows) - 1, count).astype(np.int32)
    # Rows are sharded over the devices, so their number must be a multiple of the devices'.
    padded = np.resize(selected, -(-count // jax.device_count()) * jax.device_count())
    on_host = processes.to_host(take_rows(experience, padded))
    self.write(step, 'policy', on_host, np.asarray(rows)[selected])

  def write(
    self,
    step: int,
    model: str,
    experience: Experience,
    rows: ArrayLike,
    pairs: ArrayLike | None = None,
    gold: ArrayLike | None = None,
  ) -> None:
    """Appends responses.

    Args:
      experience: arrays on the host; their first len(rows) rows are written.
      rows: the index of each response's prompt.
      pairs: see `ResponseRecord.pair`.
      gold: the gold reward of each response.
    """
    self._open(step)
    if not processes.is_first():
      return
    with writing(self._path), self._path.open('a', encoding='utf-8') as out:
      for i, row in enumerate(rows):
        segments, totals = segments_from_experience(
          experience, i, self._tokenizer, has_score=self._has_score
        )
        if gold is not None:
          totals['gold'] = float(gold[i])
        pair = None if pairs is None else int(pairs[i])
        prompt = self._messages(row)
        record = ResponseRecord(step, model, prompt, segments, totals, self._threshold, pair)
        out.write(_line(record))

  def _open(self, step: int) -> None:
    if not self._is_open and processes.is_first():
      make_directory(self._path.parent)
      truncate_json_lines(self._path, step)
    self._is_open = True


def write_records(directory: Path, records: Iterable[ResponseRecord]) -> None:
  """Writes responses of a stage without steps to its samples.jsonl, in place of earlier ones."""
  write_text_atomically(directory / RESPONSES_FILE, ''.join(map(_line, records)))


def _line(record: ResponseRecord) -> str:
  return json.dumps(dataclasses.asdict(record)) + '\n'


def segments_from_experience(
  experience: Experience, row: int, tokenizer: ChatTokenizer, *, has_score: bool
) -> tuple[list[Segment], dict[str, Any]]:
  """Returns (segments, totals) of the response in `row` of arrays on the host."""
  rollout = experience.rollout
  mask = np.asarray(rollout.response_mask[row], bool)
  ids = np.asarray(rollout.response_ids[row])[mask].tolist()
  segment_ids = experience.segments.segment_id
  arrays = (experience.ref_entropy, experience.score, experience.reward, segment_ids)
  entropy, score, reward, segment_id = (np.asarray(x[row])[mask] for x in arrays)
  difference = np.asarray(rollout.old_logprob[row] - experience.ref_logprob[row])[mask]
  totals = {
    'reward': to_number(reward.sum()),
    'kl': to_number(difference.sum()),
    'length': len(ids),
    'finished': bool(rollout.finished[row]),
  }
  count = int(segment_id.max(initial=-1)) + 1
  rewards = [float(reward[segment_id == index].sum()) for index in range(count)]
  texts = tokenizer.token_texts(ids)
  scores = score if has_score else None
  segments = make_segments(texts, segment_id, entropy, scores, reward=rewards)
  if experience.parts is None:
    return segments, totals
  parts = {name: np.asarray(x[row])[mask] for name, x in experience.parts.items()}
  totals['parts'] = {name: to_number(x.sum()) for name, x in parts.items()}
  return [
    dataclasses.replace(
      segment, parts={name: to_number(x[segment_id == k].sum()) for name, x in parts.items()}
    )
    for k, segment in enumerate(segments)
  ], totals
