"""What a chat template writes around the words of a conversation.

No token ids here: those are `segjax.data.tokenizer`'s.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from segjax.data.sources import Message
from segjax.errors import UserError

PROBE = 'Quokka'  # a word that no chat template writes by itself


def render(tokenizer: Any, messages: list[Message], has_header: bool) -> str:
  """A conversation as the template writes it, perhaps with the header of the next answer.

  Raises:
    ValueError: the template refuses it.
  """
  import jinja2

  try:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=has_header, tokenize=False)
  except jinja2.TemplateError as error:
    raise UserError(f'the chat template refuses this conversation: {error}') from error


def answer_text(
  tokenizer: Any, messages: Sequence[Message], prompt: str, text: str, turn_end: str
) -> str:
  """What the template adds to the prompt for one answer, without `turn_end`."""
  full = render(tokenizer, [*messages, {'role': 'assistant', 'content': text}], False)
  if not full.startswith(prompt):
    raise UserError(template_rewrites_error(prompt, full))
  if not full.endswith(turn_end) or len(full) < len(prompt) + len(turn_end):
    raise UserError(
      f'the chat template ends this turn by {full[-20:]!r} but others by {turn_end!r}; set '
      'data.chat_template to one that ends all turns alike.'
    )
  return full[len(prompt) : len(full) - len(turn_end)]


def implicit_system_turn(tokenizer: Any, turn_end: str, turn_close: str) -> str:
  """What the template writes by itself before the first turn of a prompt without system message.

  As Llama-3.1's system block: BOS and all up to the end of that first turn, which is known by the
  stop token. '' where the template writes no turn by itself; BOS alone is none.

  Args:
    tokenizer: with the chat template.
    turn_end: what the template writes after a turn.
    turn_close: what of it reaches to the stop token.
  """
  before, found, _ = render(tokenizer, [{'role': 'user', 'content': PROBE}], True).partition(PROBE)
  if not found or not turn_end.startswith(turn_close):
    return ''
  bos = tokenizer.bos_token or ''  # may be the stop token too, and is no turn
  start = len(bos) if before.startswith(bos) else 0
  for end in (turn_end, turn_close):
    at = before.find(end, start)
    if at >= 0:
      return before[: at + len(end)]
  return ''


def load_template(chat_template: str) -> str:
  """Jinja text as it is, or out of the file of that name."""
  if '{' in chat_template:
    return chat_template
  file = epath.Path(chat_template).expanduser()
  if not file.exists():
    raise UserError(f'data.chat_template={chat_template!r} is neither Jinja text nor a file.')
  return file.read_text()


def template_rewrites_error(before: str, after: str) -> str:
  """The error for a template in which a longer conversation does not begin with the shorter."""
  pairs = zip(before, after, strict=False)
  at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
  return (
    'the chat template rewrites what came before as the conversation goes on: it had '
    f'{before[max(at - 10, 0) : at + 20]!r} and has {after[max(at - 10, 0) : at + 20]!r}; set '
    'data.chat_template to one that only adds.'
  )
