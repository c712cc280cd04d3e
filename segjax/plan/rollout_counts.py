"""Counts the calls of the decode programs in a rollout of responses of known lengths.

The host's scheduler runs as it does in training. The programs on the devices are replaced by the
lengths that the responses have.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from segjax.model.decode import ChunkOutput, DecodeConfig, DecodeRows
from segjax.model.decode_cache import PrefillChunk
from segjax.model.decode_sizes import PoolSize
from segjax.model.generate import COPIES
from segjax.model.requests import Request
from segjax.model.scheduler import Programs, Scheduler
from segjax.plan.lengths import TextLengths

_CARRYING = 4  # rollouts until the share of carried responses is steady


class CountedPrograms(Programs):
  """Stands for the programs on the devices, and counts their calls.

  Attributes:
    prefills: chunks of prompts.
    prefilled: their tokens.
    rows: of all chunks of prompts, each prompt or part of one.
    read: positions of these rows, those that earlier chunks have read included.
    copies: calls that copy pages.
    chunks: chunks of decode steps.
    steps: of all chunks.
    tokens: sampled.
    positions: that rows have pages for, summed over rows and steps.
  """

  def __init__(self, response_length: Callable[[UInt32[np.ndarray, 'B 2']], Int[np.ndarray, 'B']]):
    """Sets all counts to 0.

    Args:
      response_length: tokens of the responses of these numbers, see `Request.number`.
    """
    self._response_length = response_length
    self.prefills = self.prefilled = self.rows = self.read = self.copies = 0
    self.chunks = self.steps = self.tokens = self.positions = 0

  def prefill(self, chunk: PrefillChunk) -> None:
    """Counts the tokens."""
    self.prefills += 1
    self.prefilled += int((chunk.rows.segment > 0).sum())
    self.rows += int(chunk.rows.count.sum())
    self.read += int(chunk.rows.length.sum())

  def copy_pages(self, copies: list[list[tuple[int, int]]]) -> None:
    """Copies nothing."""
    self.copies += -(-max(map(len, copies)) // COPIES)

  def decode(self, rows: DecodeRows, steps: int) -> ChunkOutput:
    """Gives each row the tokens that its response has left."""
    left = self._response_length(rows.number) - rows.count
    count = np.where(rows.active, np.minimum(left, steps), 0).astype(np.int32)
    self.chunks += 1
    self.steps += int(count.max())
    self.tokens += int(count.sum())
    # A row reads as many positions as it has at each of its steps.
    self.positions += int((count * (rows.position + 1) + count * (count - 1) // 2).sum())
    logprob, no_row = np.zeros((len(count), steps), np.float32), np.zeros(len(count), bool)
    ids = np.ones(logprob.shape, np.int32)
    return ChunkOutput(ids, logprob, logprob, count, rows.active & (count == left), no_row)


class RolloutCounts(NamedTuple):
  """Calls of the decode programs in a rollout.

  Attributes:
    prefills: chunks of prompts.
    rows: prompts of a group in one of them, on average.
    read: positions of such a prompt, on average.
    copies: calls that copy pages.
    chunks: chunks of decode steps.
    steps: of all chunks.
    live: positions that a row has at a step, on average over all rows, free ones included.
  """

  prefills: int
  rows: float
  read: float
  copies: int
  chunks: int
  steps: int
  live: float


def count_rollout(
  lengths: TextLengths,
  decoder: DecodeConfig,
  size: PoolSize,
  groups: int,
  samples: int = 1,
  *,
  carry: bool = False,
) -> RolloutCounts:
  """Returns the counts of a rollout.

  Args:
    lengths: of the responses, in the order in which they start.
    decoder: the static configuration.
    size: of the pools of pages.
    groups: of rows.
    samples: responses to each prompt.
    carry: whether a rollout ends when as many responses are done as `lengths` has, and the others
      go on in the next one; the rollout that is counted has some of an earlier one.
  """
  total = len(lengths.response)
  unfinished: list[Request] = []
  before = 0  # responses that an earlier rollout finished beyond those that it needed
  for _ in range(_CARRYING if carry else 1):
    programs = CountedPrograms(lambda key: lengths.response[key[:, 0]])
    count = 2 * total - before if carry else total
    requests = unfinished + _requests(lengths, count - len(unfinished), decoder, samples)
    scheduler = Scheduler(requests, programs, size, groups, decoder)
    enough = total - before
    while scheduler.is_busy and scheduler.num_done < enough:
      scheduler.refill()
      scheduler.step()
    before = scheduler.num_done - enough
    unfinished = [request for request in scheduler.unfinished() if len(request.response.ids)]
  return RolloutCounts(
    programs.prefills,
    programs.rows / programs.prefills / groups,
    programs.read / programs.rows,
    programs.copies,
    programs.chunks,
    programs.steps,
    programs.positions / (programs.steps * size.slots),
  )


def _requests(
  lengths: TextLengths, count: int, decoder: DecodeConfig, samples: int
) -> list[Request]:
  total = len(lengths.response)
  return [
    Request(
      np.ones(lengths.prompt[i % total], np.int32),
      i // samples,
      np.array([i % total, 0], np.uint32),
      decoder.sampling.max_new_tokens,
    )
    for i in range(count)
  ]
