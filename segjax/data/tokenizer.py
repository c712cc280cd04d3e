"""Tokenizers with a chat template: rendering, stop and pad ids.

Templates are rendered by `segjax.data.chat_template`, files are read by
`segjax.data.tokenizer_files`; datasets are made by `segjax.data.tokenize`.

Prompt and response are rendered together and tokenized SEPARATELY, so that no token spans the
boundary between the model's input and its output.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from etils import epath

from segjax.data import chat_template as templates
from segjax.data import tokenizer_files
from segjax.data.embedding_rows import EmbeddingRows, smallest_embedding
from segjax.data.sources import Message
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig


class MissingChatTemplateError(UserError):
  """The tokenizer has no chat template, and none was provided."""


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
  """A tokenizer with a chat template.

  Attributes:
    tokenizer: the fast `transformers` tokenizer.
    stop_ids: tokens that end a response; the first is the one that closes a turn.
    pad_id: token of the padding; may equal a stop id, so masks never come from ids.
    turn_end: text that the template writes after an assistant's words.
    turn_close: beginning of `turn_end` that a response keeps, up to and including the stop token.
    preamble: turn that the template inserts before a conversation without system message, with
      BOS, as Llama-3.1's does; '' if it inserts none.
    rows: the embedding that ids must not exceed; None before `for_networks`.
  """

  tokenizer: Any
  stop_ids: tuple[int, ...]
  pad_id: int
  turn_end: str
  turn_close: str
  preamble: str = ''
  rows: EmbeddingRows | None = None

  def for_networks(self, networks: dict[str, LlamaConfig]) -> 'ChatTokenizer':
    """Returns this tokenizer for networks by name: ids that one cannot read are refused.

    Stop ids that they cannot read are left out: no policy samples them.

    Raises:
      UserError: the chat template itself writes such an id.
    """
    rows = smallest_embedding(networks)
    limited = dataclasses.replace(self, rows=rows)
    limited.response_ids([{'role': 'user', 'content': templates.PROBE}], templates.PROBE)
    limited.prompt_ids([{'role': 'user', 'content': templates.PROBE}])
    stop_ids = tuple(i for i in self.stop_ids if i < rows.count)
    # Padding is masked, so that any token does where the pad token has no row.
    pad_id = self.pad_id if self.pad_id < rows.count else stop_ids[0]
    return dataclasses.replace(limited, stop_ids=stop_ids, pad_id=pad_id)

  def prompt_text(self, messages: Sequence[Message]) -> str:
    """Returns the conversation followed by the header that opens the assistant's turn."""
    return templates.render(self.tokenizer, list(messages), True)

  def response_texts(
    self, messages: Sequence[Message], prompt: str, responses: Sequence[str]
  ) -> list[str]:
    """Returns what the template appends to the prompt for each response, stop token last.

    Args:
      messages: the prompt.
      prompt: `prompt_text(messages)`.
      responses: alternative answers of the assistant.

    Raises:
      ValueError: the template changes the prompt once it is answered.
    """
    return [
      templates.answer_text(self.tokenizer, messages, prompt, text, self.turn_end) + self.turn_close
      for text in responses
    ]

  def turn_texts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Returns a conversation as pieces of text, True for assistant turns with their stop token.

    Messages after the last assistant turn are left out, and text of the template after a stop
    token belongs to the following piece. A turn without words, or one that opens the conversation,
    does not count as an assistant's.

    Raises:
      ValueError: the template changes earlier turns when a turn is added.
    """
    pieces, done = [], ''
    for number, message in enumerate(messages):
      before = messages[:number]
      if message['role'] != 'assistant' or not before:
        continue
      prompt = self.prompt_text(before)
      if not prompt.startswith(done):
        raise UserError(templates.template_rewrites_error(done, prompt))
      text = message['content']
      words = templates.answer_text(self.tokenizer, before, prompt, text, self.turn_end)
      pieces += [(prompt[len(done) :], False), (words + self.turn_close, bool(text.strip()))]
      ending = self.turn_close if self.turn_end.startswith(self.turn_close) else self.turn_end
      done = prompt + words + ending
    return pieces

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without added special tokens, by one batch call."""
    if not texts:
      return []
    encoded = self.tokenizer(
      list(texts),
      add_special_tokens=False,
      return_attention_mask=False,
      return_token_type_ids=False,
      verbose=False,
    )
    return self._checked(encoded['input_ids'])

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns token ids as `encode` and (first character, last character + 1) of each token."""
    encoded = self.tokenizer(
      text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    (ids,) = self._checked([encoded['input_ids']])
    return ids, [tuple(pair) for pair in encoded['offset_mapping']]

  @property
  def bos_ids(self) -> list[int]:
    """The BOS token that plain text follows, if there is one."""
    bos = self.tokenizer.bos_token_id
    return self._checked([[] if bos is None else [bos]])[0]

  def _checked(self, rows: list[list[int]]) -> list[list[int]]:
    if self.rows is not None:
      self.rows.check(self.tokenizer, rows)
    return rows

  def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids of `prompt_text`."""
    return self.encode([self.prompt_text(messages)])[0]

  def response_ids(self, prompt_messages: Sequence[Message], text: str) -> list[int]:
    """Returns the token ids of one response, stop token last."""
    prompt = self.prompt_text(prompt_messages)
    return self.encode(self.response_texts(prompt_messages, prompt, [text]))[0]

  def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
    """Returns the text of token ids, by default without special tokens."""
    return self.tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )

  @property
  def special_ids(self) -> set[int]:
    """Ids of tokens that are not text: those that open, close and pad."""
    added = self.tokenizer.added_tokens_decoder
    return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

  def ids_ending_in(self, delimiters: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of tokens whose text ends in a delimiter, ignoring trailing spaces, sorted.

    Special tokens are excluded. A delimiter that the vocabulary splits over several tokens matches
    none of them.

    Args:
      delimiters: texts that end a sentence, for example '.', '!', '?' and a newline.

    Raises:
      ValueError: no token ends in any of them.
    """
    ids = sorted({*self.tokenizer.get_vocab().values()} - self.special_ids)
    texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    ends = tuple(delimiters)
    matches = tuple(
      i for i, text in zip(ids, texts, strict=True) if text.rstrip(' ').endswith(ends)
    )
    if not matches:
      raise UserError(
        f'segmentation.delimiters={list(ends)}: no token ends in one of them; choose others, or '
        "set segmentation.boundary to 'entropy'."
      )
    return matches


def load_tokenizer(directory: str, chat_template: str = '') -> ChatTokenizer:
  """Loads a tokenizer in HF form and determines from its chat template how a turn ends.

  Args:
    directory: local, or on a bucket (gs://).
    chat_template: Jinja text, or the path of a file with it; '' uses the tokenizer's own.

  Raises:
    ValueError: there is no tokenizer, no chat template or no token that ends a turn, or the
      template changes earlier turns.
  """
  tokenizer = tokenizer_files.load_fast_tokenizer(directory)
  if chat_template:
    tokenizer.chat_template = templates.load_template(chat_template)
  if not tokenizer.chat_template:
    raise MissingChatTemplateError(
      f'{directory}: the tokenizer has no chat template; set data.chat_template to one (Jinja text '
      'or a file with it).'
    )
  try:
    stops = tokenizer_files.generation_stops(epath.Path(directory).expanduser())
    return _with_turn_end(tokenizer, stops)
  except ValueError as error:
    raise UserError(f'{directory}: {error}') from error


def _with_turn_end(tokenizer: Any, generation_stops: list[int]) -> ChatTokenizer:
  """Renders a short conversation and determines from it how an assistant's turn ends."""
  messages = [{'role': 'user', 'content': 'Hello'}]
  prompt = templates.render(tokenizer, messages, True)
  _check_bos(tokenizer, prompt)
  answered = templates.render(
    tokenizer, [*messages, {'role': 'assistant', 'content': templates.PROBE}], False
  )
  if not answered.startswith(prompt):
    raise UserError(templates.template_rewrites_error(prompt, answered))
  _, probe, turn_end = answered[len(prompt) :].rpartition(templates.PROBE)
  if not probe:
    raise UserError("the chat template leaves out the assistant's words; check data.chat_template.")
  eos = tokenizer.eos_token_id
  candidates = {*tokenizer.added_tokens_decoder, *generation_stops, eos}
  ids = tokenizer(turn_end, add_special_tokens=False)['input_ids'] if turn_end else []
  stop = next((i for i in ids if i in candidates), None)
  if stop is not None:
    token = tokenizer.convert_ids_to_tokens(stop)
    turn_close = turn_end[: turn_end.index(token) + len(token)]
  elif eos is not None:
    stop, turn_close = eos, turn_end + tokenizer.eos_token
  else:
    raise UserError(
      'no token ends a turn: the chat template writes none and the tokenizer has no eos_token; set '
      'data.chat_template to one that closes the turn.'
    )
  others = [i for i in (eos, *generation_stops) if i is not None]
  pad = tokenizer.pad_token_id
  pad = pad if pad is not None else eos if eos is not None else stop
  stop_ids = tuple(dict.fromkeys([stop, *others]))
  preamble = templates.implicit_system_turn(tokenizer, turn_end, turn_close)
  return ChatTokenizer(tokenizer, stop_ids, pad, turn_end, turn_close, preamble)


def _check_bos(tokenizer: Any, prompt: str) -> None:
  ids = tokenizer(prompt, add_special_tokens=False)['input_ids']
  bos = tokenizer.bos_token_id
  if bos is not None and ids[:2] == [bos, bos]:
    raise UserError(
      f'the chat template begins with {tokenizer.bos_token!r} twice; set data.chat_template to one '
      'that writes it once.'
    )
