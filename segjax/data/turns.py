"""Splits a rendered conversation into what an assistant is trained to write and the rest.

One way renders the conversation up to each answer, which is exact for every template and takes
time with the square of the number of answers. A long conversation is rendered a few times only, and
its pieces are compared with the exact ones at the 1st, 2nd, 4th, 8th, ... and last answer.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from segjax.data import chat_template as templates
from segjax.data.sources import Message
from segjax.errors import UserError

Piece = tuple[str, bool]  # text, and whether it is an answer

_FEW = 8  # answers that are rendered one by one


@dataclasses.dataclass(frozen=True)
class TurnSplitter:
  """Splits conversations by a tokenizer's template.

  Attributes:
    tokenizer: tokenizer with the chat template.
    turn_end: text that the template writes after an assistant's words.
    turn_close: what an answer ends in, up to and including the stop token.
  """

  tokenizer: Any
  turn_end: str
  turn_close: str

  @property
  def _ending(self) -> str:
    """Text after an answer's words that belongs to no other turn."""
    return self.turn_close if self.turn_end.startswith(self.turn_close) else self.turn_end

  def split(self, messages: Sequence[Message]) -> list[Piece]:
    """Returns the pieces: before each answer, and the answer; see `ChatTokenizer.turn_texts`.

    Raises:
      UserError: the template changes earlier turns when a turn is added.
    """
    answers = [i for i, m in enumerate(messages) if i and m['role'] == 'assistant']
    pieces = self._split_rendered(messages, answers) if len(answers) > _FEW else []
    return pieces or self._split_one_by_one(messages, answers)

  def _split_one_by_one(self, messages: Sequence[Message], answers: list[int]) -> list[Piece]:
    pieces, done = [], ''
    for index in answers:
      prompt, words = self._render_answer(messages, index)
      if not prompt.startswith(done):
        raise UserError(templates.template_rewrites_error(done, prompt))
      pieces += self._pieces(prompt[len(done) :], words, messages[index])
      done = prompt + words + self._ending
    return pieces

  def _render_answer(self, messages: Sequence[Message], index: int) -> tuple[str, str]:
    """Returns (everything before the answer in messages[index], its words) as rendered."""
    before = messages[:index]
    prompt = templates.render(self.tokenizer, list(before), True)
    text = messages[index]['content']
    return prompt, templates.answer_text(self.tokenizer, before, prompt, text, self.turn_end)

  def _pieces(self, before: str, words: str, message: Message) -> list[Piece]:
    return [(before, False), (words + self.turn_close, bool(message['content'].strip()))]

  def _split_rendered(self, messages: Sequence[Message], answers: list[int]) -> list[Piece]:
    """Returns the pieces of the conversation as rendered once; [] if they cannot be told apart."""
    messages = messages[: answers[-1] + 1]
    text = templates.render(self.tokenizer, list(messages), False)
    spans = self._find_answers(text, messages, answers)
    checked = {*(1 << bit for bit in range(len(spans).bit_length())), len(spans)}
    for number in sorted(checked & set(range(1, len(spans) + 1))):
      start, stop = spans[number - 1]
      if self._render_answer(messages, answers[number - 1]) != (text[:start], text[start:stop]):
        return []
    pieces, done = [], 0
    for index, (start, stop) in zip(answers, spans, strict=bool(spans)):
      pieces += self._pieces(text[done:start], text[start:stop], messages[index])
      done = stop + len(self._ending)
    return pieces

  def _find_answers(
    self, text: str, messages: Sequence[Message], answers: list[int]
  ) -> list[tuple[int, int]]:
    """Returns (first, last + 1) character of each answer in the rendered text; [] if unclear.

    A rendering with a placeholder for each answer says what stands between the answers.
    """
    marked = list(messages)
    for number, index in enumerate(answers):
      marked[index] = {'role': 'assistant', 'content': f'{templates.PROBE}{number:09d}'}
    rendered = templates.render(self.tokenizer, marked, False)
    between = re.split(templates.PROBE + r'\d{9}', rendered)
    if len(between) != len(answers) + 1 or not text.startswith(between[0]):
      return []
    spans, position = [], len(between[0])
    for index, following in zip(answers, between[1:], strict=True):
      words = self._find_words(text, position, messages[index]['content'], following)
      if words is None or not following.startswith(self._ending):
        return []
      spans.append((position, position + len(words)))
      position += len(words) + len(following)
    return spans

  def _find_words(self, text: str, position: int, content: str, following: str) -> str | None:
    """Returns an answer's words, which templates may strip, as they stand in the text."""
    variants = (content, content.strip(), content.lstrip(), content.rstrip())
    return next((w for w in variants if text.startswith(w + following, position)), None)
