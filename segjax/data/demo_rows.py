"""Writes rows and a tokenizer of the demo's language, in the form of a user's own.

The writer of the responses knows the language only in part: it chooses the correct ending of a
clause with probability `skill`, so that within a clause the entropy of the next token is at most
ln 2 nats, while at the start of a clause any unused template may follow.
"""

import bisect
import dataclasses
import functools
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from segjax.data.demo_language import (
  ANIMALS,
  CLAUSES,
  PLACES,
  QUESTIONS,
  TEMPLATES,
  correct_ending,
  gold,
  split_clauses,
  subject,
)
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
class DemoLanguage:
  """How rows are written.

  Attributes:
    min_clauses: minimum number of clauses per response.
    max_clauses: maximum number of clauses per response.
    sft_rows: number of conversations.
    pairs: number of preferences.
    skill: probability of the correct ending of a clause.
    repeats: probability that a clause repeats an earlier template.
    broken: probability that a clause of a pair is damaged (a word lost, or two swapped).
    sharpness: the label of a pair prefers a by σ(sharpness (gold(a) - gold(b))).
    gap: minimum difference of the gold rewards of a pair.
  """

  min_clauses: int = 2
  max_clauses: int = 5
  sft_rows: int = 4096
  pairs: int = 8192
  skill: float = 0.65
  repeats: float = 0.3
  broken: float = 0.08
  sharpness: float = 5.0
  gap: float = 0.4


def write(directory: Path, language: DemoLanguage, seed: int) -> None:
  """Writes the tokenizer (HF form) and sft, pairs, prompts and held_out rows (JSONL, gzipped).

  The held-out prompts ask about (animal, place) pairs that no other row mentions.
  """
  make_directory(directory)
  write_tokenizer(directory / 'tokenizer')
  rng = np.random.default_rng(seed)
  combinations = [(a, p) for a in ANIMALS for p in PLACES]
  order = rng.permutation(len(combinations))
  held_out = [combinations[i] for i in order[: len(order) // 4]]
  train = [combinations[i] for i in order[len(order) // 4 :]]

  def prompt():
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(*train[rng.integers(len(train))])

  sft = []
  for _ in range(language.sft_rows):
    text = prompt()
    sft.append({'messages': _chat(text, write_response(text, language, rng))})
  pairs = [_pair(prompt(), language, rng) for _ in range(language.pairs)]
  _write_rows(directory / 'sft.jsonl.gz', sft)
  _write_rows(directory / 'pairs.jsonl.gz', pairs)
  for name, subjects in (('prompts', train), ('held_out', held_out)):
    rows = [{'prompt': question.format(*pair)} for pair in subjects for question in QUESTIONS]
    _write_rows(directory / f'{name}.jsonl.gz', rows)


@functools.lru_cache(maxsize=16384)
def _template_weight(index: int, prompt: str) -> float:
  """Returns the writer's sampling weight of template `index`, which depends on the subject."""
  animal, place = subject(prompt)
  subjects = {'animal': ANIMALS.index(animal), 'place': PLACES.index(place)}
  about = TEMPLATES[index].about
  if about not in subjects:
    return 2.5
  return 4.0 if subjects[about] >> (index + 1) % 3 & 1 else 1.0


def write_response(prompt: str, language: DemoLanguage, rng: np.random.Generator) -> str:
  """Samples a response of the language's writer."""
  clauses: list[str] = []
  unused = list(range(len(TEMPLATES)))
  used: list[int] = []
  previous = None
  for _ in range(rng.integers(language.min_clauses, language.max_clauses + 1)):
    is_repeat = used and rng.random() < language.repeats
    if is_repeat:
      index = used[rng.integers(len(used))]
    else:
      fitting = [i for i in unused if clauses or TEMPLATES[i].about in ('animal', 'place')]
      total = list(itertools.accumulate(_template_weight(i, prompt) for i in fitting))
      # Generator.choice, several times as fast for so few.
      index = fitting[bisect.bisect(total, rng.random() * total[-1])]
    correct = correct_ending(index, prompt, previous)
    ending = int(rng.integers(2)) if correct is None else correct
    ending = ending if rng.random() < language.skill else 1 - ending
    clauses.append(TEMPLATES[index].text(ending))
    unused = [i for i in unused if i != index]
    used.append(index)
    previous = index
  return ' '.join(clauses)


def _pair(prompt: str, language: DemoLanguage, rng: np.random.Generator) -> dict[str, Any]:
  """Samples two responses, labelled by a Bradley-Terry judge of their gold rewards."""
  difference = 0.0
  while abs(difference) < language.gap:
    first, second = (
      _damage(write_response(prompt, language, rng), language.broken, rng) for _ in range(2)
    )
    difference = gold(prompt, first) - gold(prompt, second)
  margin = language.sharpness * difference
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


def write_tokenizer(directory: Path) -> None:
  """Writes a tokenizer with one token per word, Llama-3's special tokens and chat template."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = {'user', 'assistant', 'system', *ANIMALS, *PLACES}
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
