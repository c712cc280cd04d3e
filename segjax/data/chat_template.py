"""Renders conversations by a chat template, and separates its text from the messages' own.

Text only; token ids come from `segjax.data.tokenizer`.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from segjax import json_files
from segjax.data import named_templates
from segjax.data.sources import Message
from segjax.data.template_checks import TemplateMarks, check_answer_words
from segjax.errors import UserError

PROBE = 'Quokka'  # a word that chat templates do not contain


def render(tokenizer: Any, messages: list[Message], has_header: bool) -> str:
  """Returns a conversation rendered by the template.

  Args:
    tokenizer: tokenizer with the chat template.
    messages: the conversation.
    has_header: append the header of the assistant's next answer.

  Raises:
    UserError: the template refuses the conversation, fails on it, or takes too long.
  """
  from segjax.data import template_sandbox  # imports jinja2

  values = {'messages': messages, 'tools': None, 'documents': None}
  values |= {'add_generation_prompt': has_header} | tokenizer.special_tokens_map
  return template_sandbox.render(tokenizer.get_chat_template(), values)


def answer_text(
  tokenizer: Any, messages: Sequence[Message], prompt: str, text: str, turn_end: str
) -> str:
  """Returns what the template appends to the prompt for one answer, without `turn_end`.

  Raises:
    ValueError: the template changes the prompt or the answer, or ends this turn in another way.
  """
  full = render(tokenizer, [*messages, {'role': 'assistant', 'content': text}], False)
  if not full.startswith(prompt):
    raise UserError(template_rewrites_error(prompt, full))
  if not full.endswith(turn_end) or len(full) < len(prompt) + len(turn_end):
    raise UserError(
      f'the chat template ends this turn by {full[-20:]!r} but others by {turn_end!r}; set '
      'data.chat_template to one that ends all turns alike.'
    )
  words = full[len(prompt) : len(full) - len(turn_end)]
  check_answer_words(text, words)
  return words


def implicit_system_turn(tokenizer: Any, turn_end: str, turn_close: str) -> str:
  """Returns the turn that the template inserts before a prompt without system message.

  Llama-3.1's system block is one: BOS and everything up to the end of that turn, which is
  recognized by the stop token. '' if the template inserts no turn; BOS alone is not a turn.

  Args:
    tokenizer: tokenizer with the chat template.
    turn_end: text that the template writes after a turn.
    turn_close: beginning of `turn_end`, up to and including the stop token.
  """
  before, probe, _ = render(tokenizer, [{'role': 'user', 'content': PROBE}], True).partition(PROBE)
  if not probe or not turn_end.startswith(turn_close):
    return ''
  bos = tokenizer.bos_token or ''  # may also be the stop token
  start = len(bos) if before.startswith(bos) else 0
  for end in (turn_end, turn_close):
    position = before.find(end, start)
    if position >= 0:
      return before[: position + len(end)]
  return ''


def find_marks(tokenizer: Any, stops: Sequence[int]) -> TemplateMarks:
  """Returns what the template writes around a user's words, and the texts of the stop tokens."""
  rendered = render(tokenizer, [{'role': 'user', 'content': PROBE}], True)
  before, _, after = rendered.partition(PROBE)
  added = tokenizer.added_tokens_decoder
  texts = tokenizer.convert_ids_to_tokens([i for i in stops if i in added])
  return TemplateMarks(before, after, tokenizer.bos_token or '', tuple(texts))


def load_template(chat_template: str, tokenizer: Any) -> str:
  """Returns the template of data.chat_template: a name, Jinja text or a file with it.

  Args:
    chat_template: one of `named_templates.NAMES`, Jinja text, or the path of a file with it.
    tokenizer: the tokenizer that it is for.
  """
  if chat_template in named_templates.NAMES:
    return named_templates.make_template(chat_template, tokenizer)
  if '{' in chat_template:
    return chat_template
  file = epath.Path(chat_template).expanduser()
  if not file.exists():
    raise UserError(
      f'data.chat_template={chat_template!r} is neither Jinja text nor a file, nor one of '
      f'{", ".join(named_templates.NAMES)}; provide one of them.'
    )
  try:
    return json_files.read_bytes(file, 'give a file with Jinja text').decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'data.chat_template={chat_template!r} is not UTF-8 text ({error}).') from error


def default_template(tokenizer: Any) -> str:
  """Returns the template for conversations without tools, of a tokenizer that may have several."""
  try:
    return tokenizer.get_chat_template()
  except ValueError as error:
    names = ', '.join(tokenizer.chat_template)
    raise UserError(
      f'the tokenizer has several chat templates ({names}) and none is the default; set '
      'data.chat_template to one of them.'
    ) from error


def template_rewrites_error(before: str, after: str) -> str:
  """Returns the error for a template that changes earlier turns when a turn is added."""
  pairs = zip(before, after, strict=False)
  split = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
  part = slice(max(split - 10, 0), split + 20)
  return (
    'the chat template rewrites earlier turns when a turn is added: '
    f'{before[part]!r} became {after[part]!r}; set data.chat_template to one that only appends.'
  )
