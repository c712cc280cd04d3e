"""Splits the text of a response into what each of its tokens adds."""

from collections.abc import Callable, Sequence

_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
  """Returns the text that each token adds; they join to decode(ids), whatever the ids.

  Where several tokens form a character, the last adds the character and the others nothing. Bytes
  that form no character add the replacement characters that `decode` writes for them.

  Args:
    ids: the tokens.
    decode: maps token ids to text.
  """
  full = decode(ids)
  texts, length = [], 0  # the texts so far join to full[:length]
  begin = done = 0  # tokens begin to done are the context of the next ones
  for end in range(1, len(ids) + 1):
    # Decoded with the tokens before it: a token alone may lose the space that it begins with.
    text = decode(ids[begin:end])[len(decode(ids[begin:done])) :]
    is_complete = True
    matches = text and _REPLACEMENT not in text and full.startswith(text, length)
    if not matches or end == len(ids):
      # Part of a character, whose bytes may begin before the context; all tokens take longer.
      prefix = decode(ids[:end])
      is_complete = full.startswith(prefix)
      text = prefix[length:] if is_complete else ''
    texts.append(text)
    length += len(text)
    if is_complete:
      begin, done = done, end
  return texts
