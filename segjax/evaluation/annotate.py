"""Annotates texts with the reference's entropies, segments, scores and normalised scores."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from segjax import processes
from segjax.data.ragged import pad_rows, round_up_width
from segjax.data.sources import Message, Rows, as_conversation
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation.segment_records import AnnotatedResponse, make_segments
from segjax.model import sharding
from segjax.model.heads import scores, token_logprobs
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.rl.normalizer import normalize
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.train.text_reward import CutResponses, TextReward
from segjax.types import Normalizer, Segments, Sequences

# A tokenizer is loaded with a chat template; plain text passes through this one.
PLAIN_TEMPLATE = '{% for message in messages %}{{ message.content }}{% endfor %}'
_MAX_ROWS = 8  # texts per batch, unless there are more devices

Text = tuple[list[Message], str]  # prompt, empty for plain text, and response


@dataclasses.dataclass(frozen=True)
class Annotator:
  """The models that annotate texts, and how texts are segmented.

  Attributes:
    tokenizer: of the reference, and of the reward model unless that reads text.
    reference: the model whose entropies segment, or log-probs.
    reward: the reward model; None if segments have no scores.
    params: parameters of 'reference' and, where present, 'reward'.
    segmenter: how texts are segmented.
    normalizer: normaliser of the scores; None without one, and then normalised scores are None.
    std_floor_ratio: floor of Std(p), see `rl.normalizer.normalize`.
    mesh: the devices.
    text: how the reward model reads texts; None if it reads the tokens of `tokenizer`.
  """

  tokenizer: ChatTokenizer
  reference: LlamaConfig
  reward: LlamaConfig | None
  params: dict[str, Any]
  segmenter: Segmenter
  normalizer: Normalizer | None
  std_floor_ratio: float | None
  mesh: Mesh
  text: TextReward | None = None

  @property
  def max_length(self) -> int:
    """The longest text in tokens that all networks of these tokens can read."""
    networks = [self.reference]
    if self.reward is not None and self.text is None:
      networks.append(self.reward)
    return min(network.max_position_embeddings for network in networks)

  def describe(self) -> str:
    """Returns the sizes of the networks, and the devices, in a line."""
    network = self.reward or self.reference
    return (
      f'{num_parameters(network):,} parameters, {network.num_hidden_layers} layers, '
      f'{self.max_length:,} positions, {network.dtype}, {self.mesh.size} x '
      f'{self.mesh.devices.flat[0].device_kind}'
    )


class TextBatch(NamedTuple):
  """Texts as token ids.

  Attributes:
    texts: (prompt, response) of each.
    responses: token ids of each response.
    spans: position of each response in its row.
    sequences: the rows on the mesh, padded to one of few widths; there may be more rows than texts.
  """

  texts: Sequence[Text]
  responses: list[list[int]]
  spans: list[slice]
  sequences: Sequences


def read_texts(rows: Rows) -> Iterator[Text]:
  """Yields (prompt, response) of conversations, or of the chosen side of preferences.

  Raises:
    UserError: the last message of a row is not the assistant's.
  """
  for index, row in enumerate(rows):
    messages = as_conversation(row, rows.location(index))
    if messages[-1]['role'] != 'assistant':
      raise UserError(
        f'{rows.location(index)}: the last message is not the assistant’s; add the answer.'
      )
    yield messages[:-1], messages[-1]['content']


def annotate(
  annotator: Annotator, texts: Sequence[Text], batch_size: int = 8
) -> Iterator[AnnotatedResponse]:
  """Annotates the texts in their order, `batch_size` at a time.

  Raises:
    UserError: a text is longer than the networks' positions.
  """
  for batch in text_batches(annotator, texts, batch_size):
    arrays = _run_models(annotator, batch)
    for row, (text, ids, span) in enumerate(
      zip(batch.texts, batch.responses, batch.spans, strict=True)
    ):
      outputs = TokenOutputs(*(x[row, span] for x in arrays))
      yield _annotated_response(annotator, text, ids, outputs)


def text_batches(
  annotator: Annotator, texts: Sequence[Text], batch_size: int
) -> Iterator[TextBatch]:
  """Yields the texts as token ids on the mesh, `batch_size` rows at a time.

  Raises:
    UserError: a text is longer than the networks' positions.
  """
  tokenizer, max_length = annotator.tokenizer, annotator.max_length
  for start in range(0, len(texts), batch_size):
    chunk = texts[start : start + batch_size]
    tokenized = []
    for number, text in enumerate(chunk, start + 1):
      with located(f'text {number}'):
        tokenized.append(_tokenize(tokenizer, *text))
    lengths = [len(prompt) + len(response) for prompt, response in tokenized]
    for number, length in enumerate(lengths, start + 1):
      if length > max_length:
        raise UserError(
          f'text {number} has {length} tokens, but the networks have {max_length} positions; '
          'shorten it.'
        )
    width = min(max_length, round_up_width(max(lengths)))
    rows = [prompt + response for prompt, response in tokenized]
    rows += [[]] * (batch_size - len(rows))
    ids, mask = pad_rows(rows, width, tokenizer.pad_id)
    finished = np.zeros(batch_size, bool)
    spans = []
    for row, (prompt, response) in enumerate(tokenized):
      spans.append(slice(len(prompt), lengths[row]))
      mask[row, : len(prompt)] = False
      finished[row] = bool(response) and response[-1] in tokenizer.stop_ids
    arrays = sharding.place_batch((ids, mask, finished), annotator.mesh)
    yield TextBatch(chunk, [response for _, response in tokenized], spans, Sequences(*arrays))


def _tokenize(
  tokenizer: ChatTokenizer, prompt: list[Message], response: str
) -> tuple[list[int], list[int]]:
  """Returns the token ids of (prompt, response); plain text follows the BOS token."""
  if not prompt:
    return tokenizer.text_ids(response)
  return tokenizer.prompt_ids(prompt), tokenizer.response_ids(prompt, response)


@contextlib.contextmanager
def located(name: str) -> Iterator[None]:
  """Puts the name of a text in front of the errors of the block."""
  try:
    yield
  except ValueError as error:
    raise UserError(f'{name}: {error}') from error


def choose_batch_size(mesh: Mesh, num_texts: int) -> int:
  """Returns the rows per batch: few for few texts, divisible over the devices."""
  rows = min(_MAX_ROWS, 1 << max(num_texts - 1, 0).bit_length())
  return -(-rows // mesh.size) * mesh.size


class TokenOutputs(NamedTuple):
  """The models' outputs at each token, [B, S] or [T]; `z` is defined where a segment ends."""

  entropy: Any
  segment_id: Any
  score: Any
  z: Any


def _run_models(annotator: Annotator, batch: TextBatch) -> TokenOutputs:
  entropy, score, segments = _token_outputs(
    annotator.params,
    batch.sequences,
    reference=annotator.reference,
    reward=None if annotator.text else annotator.reward,
    segmenter=annotator.segmenter,
  )
  if annotator.text is not None:
    score = _read_text(annotator.text, annotator.params['reward'], batch, segments)
  normalizer = annotator.normalizer or Normalizer()
  z = _normalized(score, segments, normalizer, std_floor_ratio=annotator.std_floor_ratio)
  return TokenOutputs(*processes.to_host((entropy, segments.segment_id, score, z)))


def _read_text(
  text: TextReward, params: Any, batch: TextBatch, segments: Segments
) -> Float[Array, 'B S']:
  """Returns the scores of a reward model that reads text, at the ends of segments."""
  rows = batch.sequences
  arrays = processes.to_host((rows.ids, rows.response_mask, segments.end, rows.finished))
  prompts = [prompt for prompt, _ in batch.texts]
  prompts += prompts[:1] * (len(arrays[0]) - len(prompts))
  return text.score(params, prompts, text.carry_over(CutResponses(*arrays)))[0]


@functools.partial(jax.jit, static_argnames='std_floor_ratio')
def _normalized(
  score: Float[Array, 'B S'],
  segments: Segments,
  normalizer: Normalizer,
  *,
  std_floor_ratio: float | None,
) -> Float[Array, 'B S']:
  z = functools.partial(normalize, std_floor_ratio=std_floor_ratio)
  return jax.vmap(z, (0, 0, None))(score, segments, normalizer)


@functools.partial(jax.jit, static_argnames=('reference', 'reward', 'segmenter'))
def _token_outputs(
  params: dict[str, Any],
  sequences: Sequences,
  *,
  reference: LlamaConfig,
  reward: LlamaConfig | None,
  segmenter: Segmenter,
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S'], Segments]:
  """Returns (entropies, scores, segments); the scores are 0 without a reward model."""
  ids, mask = sequences.ids, sequences.response_mask
  logprob, entropy = token_logprobs(params['reference'], ids, reference)
  score = entropy * 0 if reward is None else scores(params['reward'], ids, reward)
  signal = {'logprob': logprob, 'score': score}.get(segmenter.signal, entropy)
  return entropy, score, segment_batch(ids, mask, sequences.finished, signal, segmenter)


def _annotated_response(
  annotator: Annotator, text: Text, ids: list[int], outputs: TokenOutputs
) -> AnnotatedResponse:
  segment_id, has_score = outputs.segment_id, annotator.reward is not None
  num_segments = int(segment_id.max(initial=-1)) + 1
  ends = [np.flatnonzero(segment_id == k)[-1] for k in range(num_segments)]
  segments = make_segments(
    annotator.tokenizer.token_texts(ids),
    segment_id,
    outputs.entropy,
    outputs.score if has_score else None,
    normalized_score=outputs.z[ends] if has_score and annotator.normalizer else None,
  )
  return AnnotatedResponse(*text, segments)
