"""Rows of responses whose steps have labels, as tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from segjax.data import limits as limits_lib
from segjax.data.json_rows import Row
from segjax.data.limits import Limits
from segjax.data.row_forms import is_pair
from segjax.data.span_annotations import character_tokens, find_response
from segjax.data.step_labels import LabelledResponse, as_labelled_response
from segjax.data.token_rows import SKIPPED, TokenizedRow, Written
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepRows:
  """Responses with labelled steps; see `tokenize.tokenize_steps`."""

  tokenizer: ChatTokenizer
  limits: Limits

  ragged: ClassVar = {'tokens': np.int32, 'labels': np.float32}
  fields: ClassVar = {'row': np.int64, 'group': np.uint64}
  skipped: ClassVar = 'pairs'  # what rows of another form are counted as
  length_limit = property(lambda self: self.limits.max_length)

  def read(self, row: Row, location: str) -> LabelledResponse | None:
    """Returns the labelled response of a row; None of a pair."""
    return None if is_pair(row) else as_labelled_response(row, location)

  def write(self, labelled: LabelledResponse | None) -> Written:
    """Returns a response as text, or nothing."""
    if labelled is None:
      return SKIPPED
    prompt = self.tokenizer.prompt_text(labelled.prompt)
    (text,) = self.tokenizer.response_texts(labelled.prompt, prompt, [labelled.response])
    begin = find_response(labelled.response, text)
    # The template may strip white space around the response. What follows its words in the text is
    # then not the rest of the last step, which ends with them.
    is_whole = labelled.response in text
    last = len(labelled.response if is_whole else labelled.response.rstrip())
    ends = [(begin + min(end, last), label) for end, label in labelled.steps]
    return Written(labelled.prompt, [[prompt]], (text, ends), prompt)

  def limit(self, row: TokenizedRow, counts: dict[str, int]) -> Mapping[str, Any] | None:
    """Returns the fields of a row, None for one that is dropped."""
    ((prompt,),), (text, ends), limits = row.groups, row.flags, self.limits
    try:
      # Here, not with the prompts of the chunk: labels need the characters of each token.
      response, offsets = self.tokenizer.encode_response(row.prompt, text)
    except UserError as error:
      raise UserError(f'{row.location}: {error}') from error
    full = len(prompt), len(response)
    prompt_length, length, _ = limits_lib.pair_lengths(*full, 0, limits)
    is_truncated = (prompt_length, length) != full
    describe = 'prompt and response of {} and {} tokens'.format
    if is_truncated and limits_lib.is_dropped(row.location, describe(*full), limits, counts):
      return None
    token_of_char = character_tokens(offsets, len(text))
    labels = np.full(prompt_length + length, np.nan, np.float32)
    for end, label in ends:
      # Nothing of a step is left that ends in white space before the words.
      token = token_of_char[end - 1] if end >= 1 else length
      if token < length:
        labels[prompt_length + token] = label
    if np.isnan(labels).all():
      counts['dropped_empty'] += 1
      return None
    counts['truncated'] += is_truncated
    ids = np.concatenate([prompt[full[0] - prompt_length :], np.array(response[:length], np.int32)])
    return {'tokens': ids, 'labels': labels, 'row': row.index, 'group': row.key}
