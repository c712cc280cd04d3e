"""Writes rows and a tokenizer of a built-in language, in the form of a user's own."""

import dataclasses
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from segjax.data.demo_language import ANIMALS, CLAUSES, PLACES, QUESTIONS, split_clauses
from segjax.data.languages import Language, gold
from segjax.storage import make_directory, writing

SPECIAL_TOKENS = (
  '<|begin_of_text|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<|pad|>',
)
CHAT_TEMPLATE = (
  '<|begin_of_text|>{% for message in messages %}'
  "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
  "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  '{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class RowCounts:
  """How many rows are written, and how pairs are labelled.

  Attributes:
    sft_rows: number of conversations.
    pairs: number of preferences.
    broken: probability that a clause of a pair is damaged (a word lost, or two swapped).
    sharpness: the label of a pair prefers a by σ(sharpness (gold(a) - gold(b))).
    gap: minimum difference of the gold rewards of a pair.
  """

  sft_rows: int
  pairs: int
  broken: float = 0.08
  sharpness: float = 5.0
  gap: float = 0.4


def write(directory: Path, language: Language, counts: RowCounts, seed: int) -> None:
  """Writes the tokenizer (HF form) and sft, pairs, prompts and held_out rows (JSONL, gzipped).

  The held-out prompts ask about (animal, place) pairs that no other row mentions.
  """
  make_directory(directory)
  write_tokenizer(directory / 'tokenizer', language.words)
  rng = np.random.default_rng(seed)
  combinations = [(a, p) for a in ANIMALS for p in PLACES]
  order = rng.permutation(len(combinations))
  held_out = [combinations[i] for i in order[: len(order) // 4]]
  train = [combinations[i] for i in order[len(order) // 4 :]]

  sft = []
  for _ in range(counts.sft_rows):
    prompt = language.ask(train, rng)
    sft.append({'messages': _chat(prompt, language.respond(prompt, rng))})
  pairs = [_pair(language, language.ask(train, rng), counts, rng) for _ in range(counts.pairs)]
  _write_rows(directory / 'sft.jsonl.gz', sft)
  _write_rows(directory / 'pairs.jsonl.gz', pairs)
  for name, subjects in (('prompts', train), ('held_out', held_out)):
    rows = [{'prompt': text} for pair in subjects for text in language.questions(pair, rng)]
    _write_rows(directory / f'{name}.jsonl.gz', rows)


def _pair(
  language: Language, prompt: str, counts: RowCounts, rng: np.random.Generator
) -> dict[str, Any]:
  """Samples two responses, labelled by a Bradley-Terry judge of their gold rewards."""
  difference = 0.0
  while abs(difference) < counts.gap:
    first, second = (_damage(language.respond(prompt, rng), counts.broken, rng) for _ in range(2))
    difference = gold(prompt, first) - gold(prompt, second)
  margin = counts.sharpness * difference
  if rng.random() >= 1 / (1 + np.exp(-margin)):
    first, second = second, first
  return {'messages': _chat(prompt), 'chosen': first, 'rejected': second}


def _damage(response: str, probability: float, rng: np.random.Generator) -> str:
  """Returns the response with some clauses damaged: a word lost, or two neighbours swapped."""
  clauses = []
  for clause in split_clauses(response):
    words = clause.split(' ')
    if rng.random() < probability:
      index = int(rng.integers(len(words) - 2))
      if rng.random() < 0.5:
        del words[index]
      else:
        words[index : index + 2] = words[index + 1], words[index]
    clauses.append(' '.join(words))
  return ' '.join(clauses)


def _chat(prompt: str, response: str | None = None) -> list[dict[str, str]]:
  messages = [{'role': 'user', 'content': prompt}]
  return messages if response is None else [*messages, {'role': 'assistant', 'content': response}]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
  # mtime=0: equal rows give equal files, so that a second run sees unchanged inputs.
  with writing(path), gzip.GzipFile(path, 'wb', mtime=0) as file:
    file.write(''.join(json.dumps(row) + '\n' for row in rows).encode())


def write_tokenizer(directory: Path, more_words: Iterable[str] = ()) -> None:
  """Writes a tokenizer with one token per word, Llama-3's special tokens and chat template.

  Args:
    directory: to write.
    more_words: of the language, beside those of `demo_language`.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = {'user', 'assistant', 'system', *ANIMALS, *PLACES, *more_words}
  for text in (*QUESTIONS, *CLAUSES):
    words.update(text.replace('{}', '').split())
  vocabulary = [*SPECIAL_TOKENS, '<|unknown|>', *sorted(words)]
  vocabulary += [f'<|reserved_{i}|>' for i in range(-len(vocabulary) % 16)]
  tokenizer = Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token='<|unknown|>')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.decoder = decoders.WordPiece(prefix='##', cleanup=False)
  tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=SPECIAL_TOKENS[0],
    eos_token='<|eot_id|>',
    pad_token='<|pad|>',
    unk_token='<|unknown|>',
    clean_up_tokenization_spaces=False,
  )
  fast.chat_template = CHAT_TEMPLATE
  fast.save_pretrained(directory)
