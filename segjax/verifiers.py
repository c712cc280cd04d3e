"""Ready reward functions whose verdict can be computed, most of them from a column of the row.

Each is named by a setting, as in --config.reward_shaping.reward_fn=segjax.verifiers:numeric_answer,
or by config.evaluate.gold_reward_fn. They return a number from 0 to 1.
"""

import collections
import decimal
import json
import re
import unicodedata
from typing import Any

_NUMBER = re.compile(r'-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)')


def exact_answer(prompt: str, response: str, *, row: dict[str, Any]) -> float:
  """Returns 1 if the final answers of the response and of row['answer'] are the same text.

  A final answer is what follows the last '####', as in GSM8K (arXiv:2110.14168), else the whole
  text; capital letters and white space make no difference.
  """
  return float(_final(response) == _final(str(row['answer'])))


def numeric_answer(prompt: str, response: str, *, row: dict[str, Any]) -> float:
  """Returns 1 if the final answers of the response and of row['answer'] are the same number.

  The number is the last one in the final answer, see `exact_answer`: 1,000 in 'So it is $1,000.00.'
  """
  answer = _last_number(str(row['answer']))
  return float(answer is not None and _last_number(response) == answer)


def regular_expression(prompt: str, response: str, *, row: dict[str, Any]) -> float:
  """Returns 1 if the regular expression row['pattern'] matches somewhere in the response."""
  return float(re.search(row['pattern'], response) is not None)


def valid_json(prompt: str, response: str) -> float:
  """Returns 1 if the response is one JSON value, alone or as the only block of code."""
  text = re.sub(r'\A\s*```(?:json)?\s*\n(.*)```\s*\Z', r'\1', response, flags=re.DOTALL)
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return 0.0
  return 1.0


def word_limit(prompt: str, response: str, *, row: dict[str, Any]) -> float:
  """Returns the share of the response's words that are within row['max_words'], 1 up to it."""
  return min(1.0, row['max_words'] / max(1, len(response.split())))


def same_script(prompt: str, response: str) -> float:
  """Returns the share of the response's letters in the script of most letters of the prompt.

  1 where one of the two has no letters. Japanese and Korean mix scripts; see `script`.
  """
  wanted, counts = _scripts(prompt), _scripts(response)
  return _share(counts, {wanted.most_common(1)[0][0]}) if wanted else 1.0


def script(prompt: str, response: str, *, row: dict[str, Any]) -> float:
  """Returns the share of the response's letters in the scripts row['script'], 1 without letters.

  Scripts are the first words of Unicode names of letters, joined by spaces: 'latin', 'cyrillic',
  'cjk hiragana katakana', 'hangul'.
  """
  return _share(_scripts(response), set(row['script'].upper().split()))


def _final(text: str) -> str:
  return ' '.join(text.rpartition('####')[2].lower().split())


def _last_number(text: str) -> decimal.Decimal | None:
  numbers = _NUMBER.findall(_final(text))
  return decimal.Decimal(numbers[-1].replace(',', '')) if numbers else None


def _scripts(text: str) -> collections.Counter[str]:
  """Returns the number of letters of each script, by the first word of their Unicode names."""
  names = (unicodedata.name(letter, '') for letter in text if letter.isalpha())
  return collections.Counter(name.split()[0] for name in names if name)


def _share(counts: collections.Counter[str], scripts: set[str]) -> float:
  return sum(counts[name] for name in scripts) / counts.total() if counts else 1.0
