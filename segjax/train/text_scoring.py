"""Scores of a reward model that reads text, by its own tokenizer and chat template.

Its tokens are not the policy's. A segment is a span of text there, and its end is carried over as a
number of characters; `train.scoring` runs a reward model that reads the policy's tokens.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from segjax.data.ragged import pad_rows
from segjax.data.row_forms import Message
from segjax.data.span_annotations import character_tokens
from segjax.data.tokenizer import ChatTokenizer
from segjax.model import sharding
from segjax.model.heads import scores
from segjax.model.llama import LlamaConfig
from segjax.train.rollout_rows import concatenate, take_rows
from segjax.train.rollout_scoring import chunk_rows

NOT_READ = -1  # in place of an end


@dataclasses.dataclass(frozen=True)
class StepMarks:
  """What a process reward model reads at the end of each step.

  Attributes:
    tag: text behind the words of a step, at whose last token the score is read; '': at the step's
      last token.
    delimiter: text between two steps, in place of the white space there; None keeps it.
  """

  tag: str = ''
  delimiter: str | None = None


class TextRow(NamedTuple):
  """A text as token ids, and the token at which each score is read; NOT_READ where none is.

  Attributes:
    is_cut: whether it was longer than the network's positions.
  """

  ids: list[int]
  positions: Int[np.ndarray, 'K']
  is_cut: bool = False


@dataclasses.dataclass(frozen=True)
class TextScorer:
  """A frozen reward model that reads text.

  Attributes:
    network: the network.
    tokenizer: its own, with its own chat template.
    mesh: the devices.
    marks: what it reads at the ends of steps.
  """

  network: LlamaConfig
  tokenizer: ChatTokenizer
  mesh: Mesh
  marks: StepMarks = StepMarks()

  def score(
    self,
    params: Any,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    ends: Int[np.ndarray, 'B K'],
    batch_size: int = 0,
  ) -> Float[Array, 'B K']:
    """Returns raw scores of responses at the ends of their segments; 0 where none is read.

    The forward passes are dispatched; nothing waits for them. Texts of similar length share a
    batch, which has one of few widths.

    Args:
      params: parameters of the network.
      prompts: messages before each response.
      responses: the responses, without special tokens.
      ends: the characters of the response that a segment ends behind, see `tokenize`.
      batch_size: texts at once; 0 for all.

    Raises:
      UserError: the chat template refuses a prompt.
    """
    rows = [self.tokenize(*row) for row in zip(prompts, responses, ends, strict=True)]
    if cut := sum(row.is_cut for row in rows):
      logging.log_first_n(
        logging.WARNING,
        '%d of %d texts have more tokens by the reward model’s tokenizer than its %d positions: '
        'they lose the beginning of their prompt (said once)',
        1,
        *(cut, len(rows), self.network.max_position_embeddings),
      )
    count, size = len(rows), batch_size or len(rows)
    rows += [TextRow(rows[0].ids[:1], np.full(ends.shape[1], NOT_READ))] * (-count % size)
    length = np.array([len(row.ids) for row in rows])
    order, parts = [], []
    for chosen, width in chunk_rows(length, size, self.network.max_position_embeddings):
      ids, _ = pad_rows([rows[i].ids for i in chosen], width, self.tokenizer.pad_id)
      positions = np.stack([rows[i].positions for i in chosen]).astype(np.int32)
      arrays = sharding.place_batch((ids, positions), self.mesh)
      parts.append(_read(params, *arrays, network=self.network))
      order.append(chosen)
    if len(parts) == 1:
      return parts[0][:count]
    back = np.argsort(np.concatenate(order))
    return take_rows(concatenate(parts), back)[:count]

  def tokenize(
    self, messages: Sequence[Message], response: str, ends: Int[np.ndarray, 'K']
  ) -> TextRow:
    """Returns prompt and response as tokens, and the token at which each score is read.

    The response follows what the chat template writes before an answer, character by character as
    it was sampled, and the stop token follows it. An end is a number of characters:

      1 to len(response)   the token that completes response[:end]. An end inside a token is read at
                           that token, and so includes the rest of it; of several tokens with bytes
                           of one character it is the last;
      0                    the last token of the prompt;
      len(response) + 1    the stop token;
      NOT_READ             none.

    A response without a prompt is plain text: it follows the BOS token, and no stop token follows.
    With a tag, the words of each step are followed by it, and an end is read at its last token. A
    text longer than the network's positions loses the beginning of its prompt. Only if the
    response alone is longer is it cut; ends behind the cut are read at its last token.

    Args:
      messages: the prompt; empty for plain text.
      response: the response, without special tokens.
      ends: in any order.
    """
    tokenizer, limit = self.tokenizer, self.network.max_position_embeddings
    text, end_in_text = mark_steps(response, ends, self.marks)
    prompt, close, before = '', '', tokenizer.bos_ids
    if messages:
      prompt, close = tokenizer.prompt_text(messages), tokenizer.turn_close
      (before,) = tokenizer.encode([prompt])
    after, offsets = tokenizer.encode_response(prompt, text + close)
    excess = len(before) + len(after) - limit
    before = list(before[max(0, min(excess, len(before) - 1)) :])
    token = character_tokens(offsets, len(text) + len(close))
    last = {NOT_READ: NOT_READ, 0: len(before) - 1, len(text) + 1: len(before) + len(after) - 1}
    positions = [
      last[end] if end in last else len(before) + int(token[end - 1]) for end in end_in_text
    ]
    clipped = np.clip(positions, NOT_READ, limit - 1)
    return TextRow([*before, *after][:limit], clipped, excess > 0)


def mark_steps(
  response: str, ends: Int[np.ndarray, 'K'], marks: StepMarks
) -> tuple[str, list[int]]:
  """Returns the response as a process reward model reads it, and where its steps end there.

  Args:
    response: the response.
    ends: where its steps end, as in `TextScorer.tokenize`.
    marks: the tag, '' to leave response and ends as they are.
  """
  if not marks.tag:
    return response, [int(end) for end in ends]
  # The stop token is not a part of the last step.
  ends = [int(min(end, len(response))) for end in ends]
  text, place, gap = '', {}, ''
  for start, end in itertools.pairwise([0, *sorted({end for end in ends if end != NOT_READ})]):
    words = response[start:end].rstrip()
    after = response[start + len(words) : end]
    if marks.delimiter is not None:
      words, after = words.lstrip() if text else words, marks.delimiter
    text += gap + words + marks.tag
    place[end], gap = len(text), after
  return text, [place.get(end, NOT_READ) for end in ends]


@functools.partial(jax.jit, static_argnames='network')
def _read(
  params: Any, ids: Int[Array, 'B S'], positions: Int[Array, 'B K'], *, network: LlamaConfig
) -> Float[Array, 'B K']:
  score = jnp.take_along_axis(scores(params, ids, network), jnp.maximum(positions, 0), axis=1)
  return jnp.where(positions == NOT_READ, 0, score)


def character_ends(
  ids: Sequence[Sequence[int] | np.ndarray],
  end: Bool[np.ndarray, 'B T'],
  mask: Bool[np.ndarray, 'B T'],
  finished: Bool[np.ndarray, 'B'],
  split: Callable[[Sequence[int]], list[str]],
) -> Int[np.ndarray, 'B T']:
  """Returns the ends of segments in characters, at their tokens; NOT_READ at other tokens.

  Args:
    ids: tokens of each response, without padding.
    end: True on the last token of each segment.
    mask: True on the tokens of the responses.
    finished: whether the last token of a response is a stop token.
    split: returns the text that each token adds; the texts join to the response.
  """
  ends = np.full(end.shape, NOT_READ)
  for row, tokens in enumerate(ids):
    if not len(tokens):
      continue
    characters = np.cumsum([len(text) for text in split([int(i) for i in tokens])])
    characters[-1] += finished[row]  # the stop token adds no text
    ends[row, mask[row]] = np.where(end[row, mask[row]], characters, NOT_READ)
  return ends
