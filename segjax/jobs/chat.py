"""A conversation with a policy in the terminal, streamed; its segments and rewards on request."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.evaluation.annotate import Annotator
from segjax.model.generate import GenerationResult, generate, make_decode_config
from segjax.report import segment_table
from segjax.report.console import log
from segjax.run.stage import Stage
from segjax.train.rollout import sampling
from segjax.types import PromptBatch

_CHUNK = 4  # tokens between two pieces of streamed text
HELP = '/segments shows the last answer cut and scored, /new begins anew, /quit or Ctrl-D ends'


def run(stage: Stage) -> dict[str, Any]:
  """Talks until the input ends; config.rollout says how answers are sampled.

  Raises:
    ValueError: config.policy.path is empty or no checkpoint.
  """
  if not stage.settings.policy.path:
    raise UserError('config.policy.path is empty: give a checkpoint to talk to.')
  if processes.process_count() > 1:
    raise UserError('chat runs in one process, for it reads from its terminal.')
  reader = annotate.load(stage)
  log(f'{stage.settings.policy.path}: {HELP}')
  messages: list[Message] = []
  answers = 0
  for line in _lines():
    if line == '/new':
      messages = []
    elif line == '/segments':
      _show(stage, reader, messages)
    elif line.startswith('/'):
      log(HELP)
    else:
      messages = [*messages, {'role': 'user', 'content': line}]
      messages = _that_fit(stage, reader, messages)
      answer = reply(stage, reader, messages, answers, _write)
      sys.stdout.write('\n')
      messages = [*messages, {'role': 'assistant', 'content': answer}]
      answers += 1
  return {'answers': answers}


def _lines() -> Iterator[str]:
  """What the user types, until the end of the input or /quit."""
  while True:
    try:
      line = input('> ').strip()
    except EOFError:
      return
    if line == '/quit':
      return
    if line:
      yield line


def _write(text: str) -> None:
  sys.stdout.write(segment_table.escape_control(text, keep='\n\t'))
  sys.stdout.flush()


def _room(stage: Stage, reader: Annotator) -> int:
  """Tokens that a prompt may have."""
  config = reader.configs['policy']
  return config.max_position_embeddings - stage.settings.rollout.max_new_tokens


def _that_fit(stage: Stage, reader: Annotator, messages: list[Message]) -> list[Message]:
  """The messages, without the oldest turns where all of them are too long."""
  kept = messages
  while len(reader.tokenizer.prompt_ids(kept)) > _room(stage, reader) and len(kept) > 2:
    kept = kept[2:]
  if len(kept) < len(messages):
    log(
      f'(the first {len(messages) - len(kept)} messages are forgotten: there is no room for them)'
    )
  return kept


def reply(
  stage: Stage,
  reader: Annotator,
  messages: list[Message],
  number: int,
  write: Callable[[str], None],
) -> str:
  """The answer to a conversation; `write` is given its text piece by piece.

  Args:
    number: of the answer, for its random numbers.

  Raises:
    ValueError: the conversation leaves no room for an answer.
  """
  tokenizer = reader.tokenizer
  ids = np.array([tokenizer.prompt_ids(messages)], np.int32)
  stream = _Stream(tokenizer, write)
  config = reader.configs['policy']
  decoder = make_decode_config(
    config, sampling(stage.settings.rollout), tokenizer.stop_ids, stage.mesh, _CHUNK
  )
  found = generate(
    reader.params['policy'],
    PromptBatch(ids, np.array([ids.shape[1]], np.int32)),
    jax.random.fold_in(stage.key('chat'), number),
    decoder=decoder,
    mesh=stage.mesh,
    on_chunk=stream.take,
  )
  return stream.take(found, is_last=True)


@dataclasses.dataclass
class _Stream:
  """Writes what is new of a growing answer; holds back characters that are not whole yet."""

  tokenizer: ChatTokenizer
  write: Callable[[str], None]
  written: str = ''

  def take(self, found: GenerationResult, is_last: bool = False) -> str:
    """The text so far."""
    text = self.tokenizer.decode(found.response_ids[0][found.response_mask[0]])
    whole = text if is_last else text.rstrip('\ufffd')
    if whole.startswith(self.written):
      self.write(whole[len(self.written) :])
      self.written = whole
    return text


def _show(stage: Stage, reader: Annotator, messages: list[Message]) -> None:
  """The last answer, cut into segments."""
  if not messages:
    log('there is no answer yet')
    return
  text = (messages[:-1], messages[-1]['content'])
  for one in annotate.annotate(stage, reader, [text], batch=stage.mesh.size):
    segment_table.print_segments(one)
