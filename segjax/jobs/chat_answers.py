"""Answers of a chat: streamed, or searched for by the scores of a reward model."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.config.settings import RolloutSettings
from segjax.data.ragged import round_up_width
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.evaluation.annotate import Annotator
from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.model.generate import GenerationResult, generate
from segjax.train.best_of_n import Search, check_differ, nothing_found, search
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.rollout import RolloutSampler, make_decoder
from segjax.train.segmenter import sequence_scores
from segjax.train.text_reward import TextSegments
from segjax.types import PromptBatch, Segments

_CHUNK = 4  # tokens generated between two pieces of streamed text
_SEGMENT_TOKENS = 64  # in which the next segment is looked for
_NOT_FINITE = 'the model’s logits are not finite; its weights are corrupted.'
_NO_REWARD = 'this needs a reward model: start with --config.reward_model.path=DIRECTORY'


class BestOf(NamedTuple):
  """The best of how many responses is the answer, and whether of each segment instead."""

  samples: int = 1
  by_segment: bool = False

  @classmethod
  def parse(cls, line: str) -> 'BestOf':
    """Reads '/best N' or '/best N segments'; UserError if it is neither."""
    if not (match := re.fullmatch(r'/best +([1-9]\d{0,2})( +segments)?', line)):
      raise UserError('write /best N, or /best N segments; N=1 streams one answer again.')
    return cls(int(match[1]), match[2] is not None)


def reply(
  annotator: Annotator,
  messages: list[Message],
  settings: RolloutSettings,
  key: jax.Array,
  write: Callable[[str], None],
) -> str:
  """Samples the answer to a conversation; `write` receives its text as it is generated.

  Ctrl-C ends the answer; what was written of it is returned.

  Raises:
    UserError: the conversation leaves no room for an answer, or the weights are corrupted.
  """
  tokenizer, mesh = annotator.tokenizer, annotator.mesh
  ids = np.array([tokenizer.prompt_ids(messages)], np.int32)
  stream = _Stream(tokenizer, write)
  decoder = make_decoder(settings, annotator.reference, tokenizer.stop_ids, mesh, _CHUNK)
  try:
    output = generate(
      annotator.params['reference'],
      PromptBatch(ids, np.array([ids.shape[1]], np.int32)),
      key,
      decoder=decoder,
      mesh=mesh,
      on_chunk=stream.write_new,
    )
  except KeyboardInterrupt:
    return stream.written
  if output.non_finite.any():
    raise UserError(_NOT_FINITE)
  return stream.write_new(output, is_last=True)


@dataclasses.dataclass
class _Stream:
  """Writes the new part of a growing answer, holding back incomplete characters."""

  tokenizer: ChatTokenizer
  write: Callable[[str], None]
  written: str = ''

  def write_new(self, output: GenerationResult, is_last: bool = False) -> str:
    """Writes what was added since the last call; returns the text so far."""
    text = self.tokenizer.decode(output.response_ids[0][output.response_mask[0]])
    # An incomplete character decodes to the replacement character at the end.
    complete = text if is_last else text.rstrip('\ufffd')
    # Bytes that turn out to be broken may change characters that are on the terminal already; the
    # text continues behind them.
    if len(complete) > len(self.written):
      self.write(complete[len(self.written) :])
      self.written = complete
    return text


def best_reply(
  annotator: Annotator,
  messages: list[Message],
  settings: RolloutSettings,
  key: jax.Array,
  write: Callable[[str], None],
  best: BestOf,
  begin: tuple[int, ...] = (),
) -> tuple[str, float]:
  """Returns (the best answer to a conversation, its score); `write` receives its text as it grows.

  Args:
    annotator: the policy, as reference, and the reward model.
    messages: the conversation.
    settings: how answers are sampled.
    key: random key.
    write: receives text.
    best: of how many responses.
    begin: tokens that the answer begins with.

  Raises:
    UserError: there is no reward model, or the samples do not differ.
  """
  tokenizer, mesh = annotator.tokenizer, annotator.mesh
  check_searchable(annotator, settings)
  ids, limit = tokenizer.prompt_ids(messages), settings.max_new_tokens
  width = min(round_up_width(len(ids)), annotator.max_length - limit)
  prompts = PromptBatch(
    np.pad(np.array([ids], np.int32), ((0, 0), (0, width - len(ids)))),
    np.array([len(ids)], np.int32),
  )
  samples = -(-best.samples // mesh.size) * mesh.size
  sampler = RolloutSampler(
    annotator.reference,
    dataclasses.replace(settings, max_concurrent=0),
    tokenizer.stop_ids,
    mesh,
    samples,
  )
  scorer = SegmentScorer(annotator.reward, annotator.reference, annotator.segmenter)
  found = nothing_found(1, limit, tokenizer.stop_ids[0])
  found.responses.response_ids[0, : len(begin)] = begin
  found.responses.response_mask[0, : len(begin)] = True
  params = annotator.params | {'policy': annotator.params['reference']}
  stream = _Stream(tokenizer, write)
  how = Search(sampler, scorer, _SEGMENT_TOKENS if best.by_segment else 0)
  if annotator.text is not None:
    text = TextSegments(annotator.text, scorer)
    how = dataclasses.replace(how, read_text=text.option_reader(lambda number: messages))
  for kept in search(params, prompts, key, how, found):
    if kept.responses.non_finite.any():
      raise UserError(_NOT_FINITE)
    stream.write_new(kept.responses)
  return stream.write_new(kept.responses, is_last=True), float(kept.score[0])


def worst_segment(
  annotator: Annotator, messages: list[Message]
) -> tuple[tuple[int, ...], Segment, float]:
  """Returns (tokens before the worst segment of the last answer, that segment, the answer's score).

  The worst has the least normalised score, or score where the reward model has no normaliser.

  Raises:
    UserError: there is no reward model, or nothing that it scores.
  """
  if annotator.reward is None:
    raise UserError(_NO_REWARD)
  if not messages or not messages[-1]['content']:
    raise UserError('there is no answer yet')
  prompt, text = messages[:-1], messages[-1]['content']
  (response,) = annotate.annotate(annotator, [(prompt, text)], batch_size=annotator.mesh.size)
  segments = response.segments
  scores = [x.score if x.normalized_score is None else x.normalized_score for x in segments]
  if not segments or None in scores:
    raise UserError('the last answer has no segments with scores')
  worst = int(np.argmin(scores))
  before = sum(len(segment.tokens) for segment in segments[:worst])
  ids = annotator.tokenizer.response_ids(prompt, text)
  return tuple(ids[:before]), segments[worst], _score(response, annotator)


def check_searchable(annotator: Annotator, settings: RolloutSettings) -> None:
  """Raises UserError if no answer can be the best: nothing scores them, or all are equal."""
  check_differ(settings)
  if annotator.reward is None:
    raise UserError(_NO_REWARD)


def _score(response: AnnotatedResponse, annotator: Annotator) -> float:
  """Returns the score of a response, aggregated over its segments."""
  score = jnp.array([[segment.score for segment in response.segments]], jnp.float32)
  every = jnp.ones(score.shape, bool)
  index = jnp.arange(score.shape[1], dtype=jnp.int32)[None]
  segments = Segments(every, every, index, jnp.array([score.shape[1]], jnp.int32))
  return float(sequence_scores(score, segments, annotator.segmenter.segmentation)[0])
