"""Compares messages with what a chat template makes of them.

Nothing that the template drops may be missing silently, and nothing that it writes may already be
in the messages: it would be written twice.
"""

import dataclasses
from collections.abc import Sequence

from segjax.data.sources import Message
from segjax.errors import UserError

# Text that rendered conversations begin with: those of Llama-3, ChatML, Llama-2 and kin.
_OPENINGS = (
  '<|begin_of_text|>',
  '<|start_header_id|>',
  '<|im_start|>',
  '<|user|>',
  '<|system|>',
  '<start_of_turn>',
  '[INST]',
)
# A template may write a tool's result as JSON, with other characters.
_CHECKED_ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class TemplateMarks:
  """Text that a chat template writes around the words of a message.

  Attributes:
    before: everything before a user's words.
    after: everything from a user's words to those of the answer.
    bos: text of the BOS token; '' if there is none.
    stops: texts of the tokens that end a response.
  """

  before: str = ''
  after: str = ''
  bos: str = ''
  stops: tuple[str, ...] = ()

  def check_message(self, message: Message) -> None:
    """Raises UserError if the message of a prompt was rendered by a template already."""
    text, role = message['content'].strip(), message['role']
    if self.before.strip():  # a template that only joins the messages is meant for rendered text
      openings = (self.bos, *_OPENINGS) if self.bos else _OPENINGS
      opening = next((mark for mark in openings if text.startswith(mark)), '')
      header = self.before.removeprefix(self.bos).strip()
      if not opening and header and text.startswith(header):
        ending = self.after.strip()
        opening = header if ending and text.endswith(ending) else ''
      if opening:
        raise UserError(
          f'the text of the {role} begins with {opening!r}, so a chat template has written it '
          'already, and it would be written twice; provide the words alone, or set '
          "data.chat_template to {% for m in messages %}{{ m['content'] }}{% endfor %}."
        )
    if self.after.strip():
      self._check_end(message['content'], role)

  def check_answer(self, text: str) -> None:
    """Raises UserError if an answer ends in a stop token, which is written after every answer."""
    self._check_end(text, 'assistant')

  def _check_end(self, text: str, role: str) -> None:
    ending = next((stop for stop in self.stops if text.rstrip().endswith(stop)), '')
    if ending:
      raise UserError(
        f'the text of the {role} already ends in {ending!r}, which is written after it and would '
        'be written twice; remove it from the end of the text.'
      )


def check_answer_words(text: str, rendered: str) -> None:
  """Raises UserError if the text that a template makes of an answer lacks words of it."""
  if not _holds(rendered, text):
    raise UserError(
      f'the chat template changes the words of the answer: {_excerpt(text)} became '
      f'{_excerpt(rendered)}; set data.chat_template to one that keeps them.'
    )


def check_prompt_words(messages: Sequence[Message], rendered: str) -> None:
  """Raises UserError if a rendered prompt lacks words of a message, earlier answers aside.

  Templates of models that reason leave the reasoning out of earlier answers, also where such a
  model is used; see `find_changed_answer`.
  """
  number = _find_missing(messages, rendered, ('system', 'user'))
  if number is not None:
    message = messages[number]
    raise UserError(
      f'the chat template leaves out or changes the words of message {number + 1} '
      f'({message["role"]}): {_excerpt(message["content"])}; set data.chat_template to one that '
      'keeps them.'
    )


def find_changed_answer(messages: Sequence[Message], rendered: str) -> str:
  """Returns what a rendered prompt lacks of an earlier answer, as a sentence; '' if nothing."""
  number = _find_missing(messages, rendered, ('assistant',))
  if number is None:
    return ''
  return (
    f'the chat template changes the words of the earlier answer in message {number + 1}: '
    f'{_excerpt(messages[number]["content"])}'
  )


def _find_missing(messages: Sequence[Message], rendered: str, roles: tuple[str, ...]) -> int | None:
  """Returns the index of the first message of these roles whose words are missing."""
  position = 0
  for number, message in enumerate(messages):
    if message['role'] not in roles:
      continue
    words = message['content'].strip()
    start = rendered.find(words, position)  # in order, so that a repeated message counts twice
    if start >= 0:
      position = start + len(words)
    elif not _holds(rendered, words):  # a template may move the system's words
      return number
  return None


def _holds(rendered: str, text: str) -> bool:
  """Returns whether the words occur, in this order; white space may differ."""
  return text.strip() in rendered or ' '.join(text.split()) in ' '.join(rendered.split())


def _excerpt(text: str, limit: int = 60) -> str:
  return repr(text if len(text) <= limit else text[: limit - 3] + '...')
