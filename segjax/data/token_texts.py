"""Splits the text of a response into what each of its tokens adds."""

import itertools
import operator
from collections.abc import Callable, Sequence

_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


def token_texts(
  ids: Sequence[int],
  decode: Callable[[Sequence[int]], str],
  known: dict[int, str] | None = None,
) -> list[str]:
  """Returns the text that each token adds; they join to decode(ids), whatever the ids.

  Where several tokens form a character, the last adds the character, and the others what comes
  before it in the same token, or nothing. Bytes that form no character add the replacement
  characters that `decode` writes for them.

  Args:
    ids: the tokens.
    decode: maps token ids to text.
    known: texts of tokens that follow others; pass the same dict to each call with this `decode`,
      and most tokens need no decoding.
  """
  known = {} if known is None else known
  full = decode(ids)
  broken = full.find(_REPLACEMENT) % (len(full) + 1)  # characters before the first replacement
  texts, length = [], 0  # the texts so far join to full[:length]
  begin = done = start = 0  # tokens begin to done, which end at full[:start], are the context
  for end, token in enumerate(ids[:-1], 1):
    is_single = 0 < done == end - 1
    text = known.get(token) if is_single else None
    if text and full.startswith(text, start):  # as for most tokens
      texts.append(text)
      begin, done, start = done, end, start + len(text)
      length = start
      continue
    # Decoded with the tokens before it: a token alone may lose the space that it begins with.
    text = decode(ids[begin:end])[len(decode(ids[begin:done])) :]
    matches = text and _REPLACEMENT not in text and full.startswith(text, start)
    if matches and is_single:
      known[token] = text
    if not matches and not 0 <= text.find(_REPLACEMENT) < broken - start:
      # Bytes of a character may begin before the context; all tokens take longer.
      prefix = decode(ids[:end])
      matches = full.startswith(prefix)
      text = prefix[start:] if prefix.startswith(full[:start]) else ''
    agreed = len(text) if matches else _common_length(text, full[start : start + len(text)])
    texts.append(full[length : max(length, start + agreed)])
    length += len(texts[-1])
    if matches:
      begin, done, start = done, end, length
  return [*texts, full[length:]] if ids else []


def _common_length(first: str, second: str) -> int:
  """Returns the number of characters that two texts have in common at their beginning."""
  return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, first, second)))
