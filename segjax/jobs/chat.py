"""Chat with a policy in the terminal: streamed answers, their segments and rewards on request."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.data.sources import Message
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.evaluation.annotate import Annotator
from segjax.jobs.chat_answers import (
  BestOf,
  best_reply,
  check_searchable,
  reply,
  worst_segment,
)
from segjax.jobs.job import LISTED_REWARDS, POLICY, REWARD_MODEL, Job, never
from segjax.report import segment_table
from segjax.report.console import log
from segjax.run import inputs
from segjax.run.answer_rewards import AnswerRewards, load_answer_rewards
from segjax.run.scorers import load_annotator
from segjax.run.stage import Stage
from segjax.run.weights import Weights

_SURROGATES = re.compile('[\ud800-\udfff]')  # undecodable bytes, see PEP 383
HELP = (
  '/segments shows the last answer in segments, /again answers anew from its worst segment on, '
  '/best N [segments] answers by the best of N, /new starts again, /quit or Ctrl-D ends; Ctrl-C '
  'stops an answer'
)
_AGAIN = 8  # answers of which /again keeps the best


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
  weights = Weights(s.runtime, stage.mesh)
  annotator = load_annotator(policy, reward, s, stage.mesh, stage.log, weights)
  rewards = load_answer_rewards(annotator, s, weights)
  log(f'{s.policy.path}: {HELP}')
  limited = _limit_answers(s.rollout, annotator)
  conversation = _Conversation(annotator, limited, stage.key('chat'), rewards)
  for line in _lines():
    try:
      conversation.handle(line)
    except UserError as error:  # of this line: the next one may do better
      log(f'({error})')
  return {'answers': conversation.num_answers}


def _limit_answers(rollout: RolloutSettings, annotator: Annotator) -> RolloutSettings:
  """Returns the settings with answers of at most half of the policy's positions."""
  positions = annotator.reference.max_position_embeddings
  if rollout.max_new_tokens <= positions // 2:
    return rollout
  log(
    f'answers have at most {positions // 2} tokens, half of the model’s {positions} positions '
    f'(config.rollout.max_new_tokens={rollout.max_new_tokens})'
  )
  return dataclasses.replace(rollout, max_new_tokens=positions // 2)


def _lines() -> Iterator[str]:
  """Yields what the user types, until the end of the input, Ctrl-C or /quit."""
  if sys.stdin is None:
    raise UserError('chat reads from its standard input, which is closed; start it in a terminal.')
  if isinstance(sys.stdin, io.TextIOWrapper):  # not in a notebook
    sys.stdin.reconfigure(errors='surrogateescape')
  with contextlib.suppress(ImportError):  # some Pythons are built without it
    import readline  # noqa: F401, lets `input` edit lines, also longer than a terminal's buffer
  while True:
    try:
      line = input('> ').strip()
    except (EOFError, KeyboardInterrupt):
      sys.stdout.write('\n')
      return
    if line == '/quit':
      return
    text = _SURROGATES.sub('\N{REPLACEMENT CHARACTER}', line)
    if text != line:
      log('(bytes that are not text in the encoding of the terminal were replaced)')
    if text:
      yield text


def _write(text: str) -> None:
  sys.stdout.write(segment_table.escape_control(text, keep='\n\t'))
  sys.stdout.flush()


class _Conversation:
  """The messages so far, and the answers to lines that the user types."""

  def __init__(
    self,
    annotator: Annotator,
    rollout: RolloutSettings,
    key: jax.Array,
    rewards: AnswerRewards | None = None,
  ):
    self._annotator, self._rollout, self._key = annotator, rollout, key
    self._rewards = rewards
    self._messages: list[Message] = []
    self._best = BestOf()
    self.num_answers = 0

  def handle(self, line: str) -> None:
    """Obeys a command, or answers a message.

    Raises:
      UserError: the line cannot be answered; the conversation is as before.
    """
    if line == '/new':
      self._messages = []
    elif line == '/segments':
      _print_segments(self._annotator, self._messages, self._rewards)
    elif line == '/again':
      self._answer_again()
    elif line.startswith('/best'):
      best = BestOf.parse(line)
      if best.samples > 1:
        check_searchable(self._annotator, self._rollout)
      self._best = best
    elif line.startswith('/'):
      log(HELP)
    else:
      self._answer(line)

  def _answer(self, line: str) -> None:
    messages = self._truncate([*self._messages, {'role': 'user', 'content': line}])
    arguments = self._annotator, messages, self._rollout, self._next_key(), _write
    if self._best.samples == 1:
      answer, score = reply(*arguments), None
    else:
      answer, score = best_reply(*arguments, self._best)
    sys.stdout.write('\n')
    if score is not None:
      log(f'(score {score:+.3f})')
    self._messages = [*messages, {'role': 'assistant', 'content': answer}]

  def _answer_again(self) -> None:
    """Samples the last answer anew from its worst segment on, and keeps the best if it is better.

    Raises:
      UserError: there is no answer, or no reward model.
    """
    begin, worst, score = worst_segment(self._annotator, self._messages)
    log(f'(the worst segment is {segment_table.escape_control(worst.text)!r}; from there on)')
    messages = self._messages[:-1]
    answer, new = best_reply(
      self._annotator,
      messages,
      self._rollout,
      self._next_key(),
      _write,
      BestOf(max(_AGAIN, self._best.samples)),
      begin,
    )
    sys.stdout.write('\n')
    if new <= score:
      log(f'(score {new:+.3f}, not above {score:+.3f}: the answer stays as it was)')
      return
    log(f'(score {score:+.3f} -> {new:+.3f})')
    self._messages = [*messages, {'role': 'assistant', 'content': answer}]

  def _next_key(self) -> jax.Array:
    self.num_answers += 1
    return jax.random.fold_in(self._key, self.num_answers - 1)

  def _truncate(self, messages: list[Message]) -> list[Message]:
    """Drops the oldest turns of a conversation that leaves no room for an answer.

    Raises:
      UserError: the last message alone leaves no room.
    """
    positions = self._annotator.reference.max_position_embeddings
    # One position is for the stop token, which /segments adds to an answer that is cut off.
    max_prompt = positions - self._rollout.max_new_tokens - 1
    recent = messages
    while (length := len(self._annotator.tokenizer.prompt_ids(recent))) > max_prompt:
      if len(recent) <= 2:
        raise UserError(
          f'this message has {length} tokens with the chat template, and there is room for '
          f'{max_prompt}: the model has {positions} positions, and answers take up to '
          f'{self._rollout.max_new_tokens}; shorten it.'
        )
      recent = recent[2:]
    if len(recent) < len(messages):
      log(f'(dropped the {len(messages) - len(recent)} oldest messages: the context is full)')
    return recent


def _print_segments(
  annotator: Annotator, messages: list[Message], rewards: AnswerRewards | None
) -> None:
  """Prints the last answer in segments."""
  if not messages:
    log('there is no answer yet')
    return
  if not messages[-1]['content']:
    log('the last answer is empty')
    return
  text = (messages[:-1], messages[-1]['content'])
  if rewards is not None:
    segment_table.print_segments(rewards.annotate(*text))
    return
  for response in annotate.annotate(annotator, [text], batch_size=annotator.mesh.size):
    segment_table.print_segments(response)


JOB = Job(
  name='chat',
  run=run,
  sections=('seed', 'rewards'),
  inputs=(
    dataclasses.replace(POLICY, is_required=never),
    dataclasses.replace(REWARD_MODEL, is_required=never),
    LISTED_REWARDS,
  ),
  has_files=False,
  num_networks=lambda s: 2,
)
