"""Tokenizers with a chat template: rendering, stop and pad ids.

Templates are rendered by `segjax.data.chat_template`, files are read by
`segjax.data.tokenizer_files`; datasets are made by `segjax.data.tokenize`.

Prompt and response are rendered together and tokenized so that no token spans the boundary between
the model's input and its output; where none does, the ids are those of the whole text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from segjax.data import chat_template as templates
from segjax.data import joined_ids, named_templates, template_checks, tokenizer_files, word_ids
from segjax.data.embedding_rows import EmbeddingRows, smallest_embedding
from segjax.data.row_forms import PLAIN_TEXT, Message
from segjax.data.template_checks import TemplateMarks
from segjax.data.template_clock import fix_date
from segjax.data.token_texts import token_texts
from segjax.data.turn_end import find_turn_end
from segjax.data.turns import TurnSplitter
from segjax.errors import UserError


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
    marks: text that the template writes around the words of a message.
    sentinel: see `joined_ids.find_sentinel`; '' if pieces of text have the ids of the whole text.
    rows: the embedding that ids must not exceed; None before `for_networks`.
  """

  tokenizer: Any
  stop_ids: tuple[int, ...]
  pad_id: int
  turn_end: str
  turn_close: str
  preamble: str = ''
  marks: TemplateMarks = dataclasses.field(default_factory=TemplateMarks)
  sentinel: str = ''
  rows: EmbeddingRows | None = None

  def for_networks(self, networks: Mapping[str, Any]) -> 'ChatTokenizer':
    """Returns this tokenizer for networks, `LlamaConfig` by name: ids that one lacks are refused.

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

  @property
  def chat_template(self) -> str:
    """The template that renders conversations, with its date fixed; stored with the model."""
    return self.tokenizer.chat_template

  def prompt_text(self, messages: Sequence[Message]) -> str:
    """Returns the conversation followed by the header that opens the assistant's turn.

    Raises:
      ValueError: the template refuses the conversation or drops a part of it, or a template wrote
        one of its messages already.
    """
    text = templates.render(self.tokenizer, list(messages), True)
    self._check_messages(messages, text)
    return text

  def _check_messages(self, messages: Sequence[Message], rendered: str) -> None:
    for message in messages:
      if message['role'] != 'assistant':  # answers of a model are not the user's to correct
        self.marks.check_message(message)
    template_checks.check_prompt_words(messages, rendered)

  def response_texts(
    self, messages: Sequence[Message], prompt: str, responses: Sequence[str]
  ) -> list[str]:
    """Returns what the template appends to the prompt for each response, stop token last.

    Args:
      messages: the prompt.
      prompt: `prompt_text(messages)`.
      responses: alternative answers of the assistant.

    Raises:
      ValueError: the template changes the prompt or the answer, or the answer ends in a stop token.
    """
    for text in responses:
      self.marks.check_answer(text)
    return [
      templates.answer_text(self.tokenizer, messages, prompt, text, self.turn_end) + self.turn_close
      for text in responses
    ]

  def turn_texts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Returns a conversation as pieces of text, True for assistant turns with their stop token.

    Messages after the last assistant turn are left out, and text of the template after a stop
    token belongs to the following piece. A turn without words, or one that opens the conversation,
    does not count as an assistant's. A text without turns (`PLAIN_TEXT`) is trained as a whole.

    Raises:
      ValueError: the template changes earlier turns when a turn is added, or as in `prompt_text`.
    """
    if messages[0]['role'] == PLAIN_TEXT:
      return self._plain_pieces(messages[0]['content'])
    for message in messages:
      if message['role'] == 'assistant':
        self.marks.check_answer(message['content'])
    pieces = TurnSplitter(self.tokenizer, self.turn_end, self.turn_close).split(messages)
    last = max((i for i, m in enumerate(messages) if m['role'] == 'assistant'), default=0)
    if pieces:
      self._check_messages(messages[:last], ''.join(text for text, _ in pieces))
    return pieces

  def _plain_pieces(self, text: str) -> list[tuple[str, bool]]:
    """Returns a text without turns, with the BOS of the template and the stop token around it."""
    bos, stop = self.tokenizer.bos_token, self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
    has_bos = bos and self.marks.before.startswith(bos)
    words = text.removeprefix(bos) if has_bos else text  # the text may have been written with them
    return [(bos if has_bos else '', False), (words.removesuffix(stop) + stop, bool(text.strip()))]

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without added special tokens, by one batch call."""
    return self._checked(word_ids.encode(self.tokenizer, texts))

  def encode_pieces(self, groups: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
    """Returns the token ids of each piece of each group, int32; a group is one text in pieces.

    Together they are those of the whole text, unless a token of it would span two pieces.
    """
    if self.sentinel:
      joined = joined_ids.encode_joined(self.tokenizer, groups, self.sentinel)
      groups_ids = [[np.array(ids, np.int32) for ids in pieces] for pieces in joined]
    else:
      texts = list(dict.fromkeys(piece for pieces in groups for piece in pieces))
      ids = dict(zip(texts, self._words.encode(texts), strict=True))
      groups_ids = [[ids[piece] for piece in pieces] for pieces in groups]
    self._checked([ids for pieces in groups_ids for ids in pieces])
    return groups_ids

  @functools.cached_property
  def _words(self) -> word_ids.Encoder:
    return word_ids.make_encoder(self.tokenizer)

  def encode_response(self, prompt: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the token ids of a text after a prompt, and (first, last + 1) character of each."""
    context = prompt if self.sentinel else ''
    ids, offsets = joined_ids.encode_after(self.tokenizer, context, text, self.sentinel)
    self._checked([ids])
    return ids, [(start, end) for start, end in offsets.tolist()]

  def text_ids(self, text: str) -> tuple[list[int], list[int]]:
    """Returns (the BOS token or nothing, token ids) of text that no template renders.

    Raises:
      ValueError: the text begins with BOS already.
    """
    if self.bos_ids and text.startswith(self.tokenizer.bos_token):
      raise UserError(
        f'the text begins with {self.tokenizer.bos_token!r}, which is put in front of every text; '
        'remove it.'
      )
    return self.bos_ids, self.encode([text])[0]

  @property
  def bos_ids(self) -> list[int]:
    """The BOS token that plain text follows, if there is one."""
    bos = self.tokenizer.bos_token_id
    return self._checked([[] if bos is None else [bos]])[0]

  def _checked(self, rows: Any) -> Any:
    if self.rows is not None:
      self.rows.check(self.tokenizer, rows)
    return rows

  def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids of `prompt_text`."""
    return self.encode([self.prompt_text(messages)])[0]

  def response_ids(self, prompt_messages: Sequence[Message], text: str) -> list[int]:
    """Returns the token ids of one response, stop token last."""
    prompt = self.prompt_text(prompt_messages)
    (response,) = self.response_texts(prompt_messages, prompt, [text])
    return self.encode_pieces([[prompt, response]])[0][1].tolist()

  def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
    """Returns the text of token ids, by default without special tokens."""
    return self.tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )

  def token_texts(self, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds, special tokens written out; see `data.token_texts`."""
    return token_texts(ids, functools.partial(self.decode, skip_special=False))

  @property
  def special_ids(self) -> set[int]:
    """Ids of tokens that are not text: those that open, close and pad."""
    added = self.tokenizer.added_tokens_decoder
    return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

  def ids_where(self, is_chosen: Callable[[str], bool]) -> tuple[int, ...]:
    """Returns the ids of tokens whose text is chosen, sorted; special tokens are excluded."""
    ids = sorted({*self.tokenizer.get_vocab().values()} - self.special_ids)
    texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return tuple(i for i, text in zip(ids, texts, strict=True) if is_chosen(text))

  def ids_ending_in(self, delimiters: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of tokens whose text ends in a delimiter, ignoring trailing spaces, sorted.

    Special tokens are excluded. A delimiter that the vocabulary splits over several tokens matches
    none of them.

    Args:
      delimiters: texts that end a sentence, for example '.', '!', '?' and a newline.

    Raises:
      ValueError: no token ends in any of them.
    """
    ends = tuple(delimiters)
    matches = self.ids_where(lambda text: text.rstrip(' ').endswith(ends))
    if not matches:
      raise UserError(
        f'segmentation.delimiters={list(ends)}: no token ends in one of them; choose others, or '
        "set segmentation.boundary to 'entropy'."
      )
    return matches


def load_tokenizer(directory: str, chat_template: str = '', date: str = '') -> ChatTokenizer:
  """Loads a tokenizer in HF form and determines from its chat template how a turn ends.

  Args:
    directory: local, or on a bucket (gs://).
    chat_template: Jinja text, the path of a file with it, or a name of `named_templates`; '' uses
      the tokenizer's own.
    date: ISO date that the template reads where it asks for the present one; '' is today.

  Raises:
    ValueError: there is no tokenizer, no chat template or no token that ends a turn, or the
      template changes earlier turns.
  """
  tokenizer = tokenizer_files.load_fast_tokenizer(directory)
  if chat_template:
    tokenizer.chat_template = templates.load_template(chat_template, tokenizer)
  if not tokenizer.chat_template:
    raise MissingChatTemplateError(
      f'{directory}: the tokenizer has no chat template; set data.chat_template to one: '
      f'{", ".join(named_templates.NAMES)}, Jinja text or a file with it.'
    )
  tokenizer.chat_template = fix_date(templates.default_template(tokenizer), date)
  try:
    stops = tokenizer_files.generation_stops(epath.Path(directory).expanduser())
    return _with_template(tokenizer, stops)
  except ValueError as error:
    raise UserError(f'{directory}: {error}') from error


def _with_template(tokenizer: Any, generation_stops: list[int]) -> ChatTokenizer:
  """Determines from the tokenizer's chat template how turns begin and end."""
  turn = find_turn_end(tokenizer, generation_stops)
  eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
  return ChatTokenizer(
    tokenizer,
    turn.stop_ids,
    pad if pad is not None else eos if eos is not None else turn.stop_ids[0],
    turn.text,
    turn.close,
    preamble=templates.implicit_system_turn(tokenizer, turn.text, turn.close),
    marks=templates.find_marks(tokenizer, turn.stop_ids),
    sentinel=joined_ids.find_sentinel(tokenizer),
  )
