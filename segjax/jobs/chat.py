"""Chat with a policy in the terminal: streamed answers, their segments and rewards on request."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.evaluation.annotate import Annotator
from segjax.jobs.job import POLICY, REWARD_MODEL, Job, never
from segjax.model.generate import GenerationResult, generate, make_decode_config
from segjax.report import segment_table
from segjax.report.console import log
from segjax.run import inputs
from segjax.run.scorers import load_annotator
from segjax.run.stage import Stage
from segjax.train.rollout import make_sampling
from segjax.types import PromptBatch

_CHUNK = 4  # tokens generated between two pieces of streamed text
HELP = '/segments shows the last answer in segments, /new starts again, /quit or Ctrl-D ends'


def run(stage: Stage) -> dict[str, Any]:
  """Chats until the input ends; config.rollout sets how answers are sampled.

  Raises:
    UserError: config.policy.path is empty or not a checkpoint.
  """
  s = stage.settings
  if not s.policy.path:
    raise UserError('config.policy.path is empty; give a checkpoint to chat with.')
  if processes.process_count() > 1:
    raise UserError('chat reads from its terminal; start it in one process only.')
  policy = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  reward = None
  if s.reward_model.path:
    reward = inputs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
  # In chat the policy is the reference: its own entropies segment its answers.
  annotator = load_annotator(policy, reward, s, stage.mesh, stage.log)
  log(f'{s.policy.path}: {HELP}')
  messages: list[Message] = []
  num_answers = 0
  for line in _lines():
    if line == '/new':
      messages = []
    elif line == '/segments':
      _print_segments(annotator, messages)
    elif line.startswith('/'):
      log(HELP)
    else:
      messages = _truncate(
        annotator, [*messages, {'role': 'user', 'content': line}], s.rollout.max_new_tokens
      )
      key = jax.random.fold_in(stage.key('chat'), num_answers)
      answer = reply(annotator, messages, s.rollout, key, _write)
      sys.stdout.write('\n')
      messages = [*messages, {'role': 'assistant', 'content': answer}]
      num_answers += 1
  return {'answers': num_answers}


def _lines() -> Iterator[str]:
  """Yields what the user types, until the end of the input or /quit."""
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


def _truncate(annotator: Annotator, messages: list[Message], max_new_tokens: int) -> list[Message]:
  """Drops the oldest turns of a conversation that leaves no room for an answer."""
  max_prompt = annotator.reference.max_position_embeddings - max_new_tokens
  recent = messages
  while len(annotator.tokenizer.prompt_ids(recent)) > max_prompt and len(recent) > 2:
    recent = recent[2:]
  if len(recent) < len(messages):
    log(f'(dropped the {len(messages) - len(recent)} oldest messages: the context is full)')
  return recent


def reply(
  annotator: Annotator,
  messages: list[Message],
  settings: RolloutSettings,
  key: jax.Array,
  write: Callable[[str], None],
) -> str:
  """Samples the answer to a conversation; `write` receives its text as it is generated.

  Raises:
    UserError: the conversation leaves no room for an answer.
  """
  tokenizer, mesh = annotator.tokenizer, annotator.mesh
  ids = np.array([tokenizer.prompt_ids(messages)], np.int32)
  stream = _Stream(tokenizer, write)
  output = generate(
    annotator.params['reference'],
    PromptBatch(ids, np.array([ids.shape[1]], np.int32)),
    key,
    decoder=make_decode_config(
      annotator.reference, make_sampling(settings), tokenizer.stop_ids, mesh, _CHUNK
    ),
    mesh=mesh,
    on_chunk=stream.write_new,
  )
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
    if complete.startswith(self.written):
      self.write(complete[len(self.written) :])
      self.written = complete
    return text


def _print_segments(annotator: Annotator, messages: list[Message]) -> None:
  """Prints the last answer in segments."""
  if not messages:
    log('there is no answer yet')
    return
  text = (messages[:-1], messages[-1]['content'])
  for response in annotate.annotate(annotator, [text], batch_size=annotator.mesh.size):
    segment_table.print_segments(response)


JOB = Job(
  name='chat',
  run=run,
  sections=('seed',),
  inputs=(
    dataclasses.replace(POLICY, is_required=never),
    dataclasses.replace(REWARD_MODEL, is_required=never),
  ),
  has_files=False,
  num_networks=2,
)
