"""A row on its way from a source to columns of tokens: as text, then as tokens.

`segjax.data.token_forms` makes them of each kind of dataset.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from segjax.data.row_forms import Message


class Written(NamedTuple):
  """A row as text.

  Attributes:
    prompt: the messages before the answers.
    groups: texts in pieces that no token spans, see `ChatTokenizer.encode_pieces`.
    flags: what is read of the row besides.
    rendered: the prompt as text, where earlier answers in it are read but not trained.
  """

  prompt: Sequence[Message]
  groups: list[list[str]]
  flags: Any
  rendered: str = ''


SKIPPED = Written((), [], None)  # of a row of another form, which is read elsewhere


class TokenizedRow(NamedTuple):
  """A row as tokens.

  Attributes:
    index: of the row in its source.
    location: of the row, for errors.
    key: of its prompt.
    groups: ids of each piece.
    flags: as in `Written`.
    prompt: the `rendered` of `Written`.
  """

  index: int
  location: str
  key: int
  groups: list[list[np.ndarray]]
  flags: Any
  prompt: str
