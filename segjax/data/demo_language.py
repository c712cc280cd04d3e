"""A small language with a known gold reward, for the built-in demo and for experiments.

It writes a tokenizer and rows as a user would bring them; nothing here trains anything.

A prompt asks about an animal of a place. A response is a run of clauses, each a template with one
fork, its last word: all before it is shared by both ways, so a clause's value is known at its end.
There are two kinds:
  fact      true or false of this animal, or of this place
  remark    fits the clause before: a 'so' ends one way after a word on the animal and the other way
            after anything else, a 'yet' the other way round; nothing fits at the very beginning
The gold reward of a response is the mean of its clauses' values: +1 for a true fact or a fitting
remark, -1 for a false fact, an unfitting remark, a repeated clause or a broken one. An empty
response has -1.

The writer of the rows knows little: it takes the right way out of a fork with probability `skill`,
so within a clause a next-token distribution has at most ln 2 nats, while at the start of a clause
any of the unused templates may come.
"""

import dataclasses
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from segjax.errors import UserError

ANIMALS = ('otter', 'raven', 'lynx', 'heron', 'badger', 'gecko', 'bison', 'marten')
PLACES = ('coast', 'valley', 'forest', 'desert', 'island', 'marsh')
QUESTIONS = ('describe the {} of the {}', 'picture the {} of the {}')


@dataclasses.dataclass(frozen=True)
class ClauseTemplate:
  """A clause: `head` and one of two words that end it. `about` says what decides its value."""

  head: str
  fork: tuple[str, str]
  about: str

  def text(self, way: int) -> str:
    """The clause with way 0 or 1 of its fork; the full stop belongs to the last word's token."""
    return f'{self.head} {self.fork[way]}.'


TEMPLATES = (
  ClauseTemplate('its winter coat feels', ('soft', 'rough'), 'animal'),
  ClauseTemplate('most keepers feed it', ('meat', 'grain'), 'animal'),
  ClauseTemplate('young ones learn', ('swimming', 'climbing'), 'animal'),
  ClauseTemplate('experts call its hearing', ('sharp', 'dull'), 'animal'),
  ClauseTemplate('books describe it as', ('calm', 'fierce'), 'animal'),
  ClauseTemplate('children think it sounds', ('loud', 'quiet'), 'animal'),
  ClauseTemplate('nobody doubts it is', ('clever', 'slow'), 'animal'),
  ClauseTemplate('small groups travel', ('east', 'west'), 'animal'),
  ClauseTemplate('summers there are mostly', ('wet', 'dry'), 'place'),
  ClauseTemplate('stories always call it', ('lucky', 'cursed'), 'place'),
  ClauseTemplate('long winters make it', ('thin', 'fat'), 'place'),
  ClauseTemplate('local farmers find it', ('useful', 'harmful'), 'place'),
  ClauseTemplate('so careful visitors', ('approach', 'retreat'), 'so'),
  ClauseTemplate('so most guides', ('praise', 'warn'), 'so'),
  ClauseTemplate('yet some hunters', ('rest', 'chase'), 'yet'),
  ClauseTemplate('yet worried parents', ('agree', 'refuse'), 'yet'),
)

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

_CLAUSES = {
  template.text(way): (index, way) for index, template in enumerate(TEMPLATES) for way in (0, 1)
}


@functools.lru_cache(maxsize=1024)
def subject(prompt: str) -> tuple[str, str]:
  """The animal and the place that a prompt asks about; ValueError if it does not."""
  words = prompt.split()
  animal = next((word for word in words if word in ANIMALS), None)
  place = next((word for word in words if word in PLACES), None)
  if animal is None or place is None:
    raise UserError(f'prompt {prompt!r} does not ask about an animal of a place.')
  return animal, place


def correct_ending(index: int, prompt: str, previous: int | None) -> int | None:
  """The way of template `index` that has value +1 after template `previous`; None if neither."""
  about = TEMPLATES[index].about
  animal, place = subject(prompt)
  if about == 'animal':
    return _fact(ANIMALS.index(animal), index)
  if about == 'place':
    return _fact(PLACES.index(place), index)
  if previous is None:
    return None
  return int((TEMPLATES[previous].about == 'animal') != (about == 'so'))


@functools.lru_cache(maxsize=16384)
def _template_weight(index: int, prompt: str) -> float:
  """How gladly the writer takes template `index` here: of a subject some things are said more."""
  animal, place = subject(prompt)
  subjects = {'animal': ANIMALS.index(animal), 'place': PLACES.index(place)}
  about = TEMPLATES[index].about
  if about not in subjects:
    return 2.5
  return 4.0 if subjects[about] >> (index + 1) % 3 & 1 else 1.0


def _fact(subject_index: int, index: int) -> int:
  """The true way of a fact: a trait of the subject, which way says so differs by template.

  A subject has three traits, the bits of its index; template `index` asks for one of them.
  """
  trait = subject_index >> index % 3 & 1
  return trait ^ index >> 1 & 1


def clause_values(prompt: str, response: str) -> list[float]:
  """The value, +1 or -1, of each clause of a response; see the module's docstring."""
  values, said, previous = [], set(), None
  for clause in split_clauses(response):
    index, way = _CLAUSES.get(clause, (None, None))
    right = index is not None and index not in said
    values.append(1.0 if right and correct_ending(index, prompt, previous) == way else -1.0)
    said.add(index)
    previous = index
  return values


def split_clauses(response: str) -> list[str]:
  """The clauses of a response, each up to its full stop; the last may lack one."""
  clauses, words = [], []
  for word in response.split():
    words.append(word)
    if is_boundary(word):
      clauses.append(' '.join(words))
      words = []
  return [*clauses, ' '.join(words)] if words else clauses


def gold(prompt: str, response: str) -> float:
  """The gold reward: the mean value of the clauses; -1 for an empty response."""
  values = clause_values(prompt, response)
  return float(np.mean(values)) if values else -1.0


def is_boundary(token: str) -> bool:
  """Whether a clause ends with this token."""
  return token.endswith('.')


@dataclasses.dataclass(frozen=True)
class DemoLanguage:
  """How rows are written: the numbers of clauses and of rows, the writer's skill.

  Attributes:
    skill: probability of the right way out of a fork.
    sharpness: the label of a pair prefers a by σ(sharpness (gold(a) - gold(b))).
    broken: probability that a clause of a pair is broken (a word lost or swapped).
    gap: how far apart the gold rewards of a pair are at least.
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
  directory.mkdir(parents=True, exist_ok=True)
  write_tokenizer(directory / 'tokenizer')
  rng = np.random.default_rng(seed)
  combinations = [(a, p) for a in ANIMALS for p in PLACES]
  order = rng.permutation(len(combinations))
  held_out = [combinations[i] for i in order[: len(order) // 4]]
  known = [combinations[i] for i in order[len(order) // 4 :]]

  def prompt():
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(*known[rng.integers(len(known))])

  sft = []
  for _ in range(language.sft_rows):
    text = prompt()
    sft.append({'messages': _chat(text, write_response(text, language, rng))})
  pairs = [_pair(prompt(), language, rng) for _ in range(language.pairs)]
  _write_rows(directory / 'sft.jsonl.gz', sft)
  _write_rows(directory / 'pairs.jsonl.gz', pairs)
  for name, subjects in (('prompts', known), ('held_out', held_out)):
    rows = [{'prompt': question.format(*pair)} for pair in subjects for question in QUESTIONS]
    _write_rows(directory / f'{name}.jsonl.gz', rows)


def write_response(prompt: str, language: DemoLanguage, rng: np.random.Generator) -> str:
  """A response as the language's writer gives it."""
  clauses: list[str] = []
  unused = list(range(len(TEMPLATES)))
  used: list[int] = []
  previous = None
  for _ in range(rng.integers(language.min_clauses, language.max_clauses + 1)):
    again = used and rng.random() < language.repeats
    fitting = [i for i in unused if clauses or TEMPLATES[i].about in ('animal', 'place')]
    likings = np.array([_template_weight(i, prompt) for i in fitting])
    index = int(rng.choice(used) if again else rng.choice(fitting, p=likings / likings.sum()))
    right = correct_ending(index, prompt, previous)
    way = int(rng.integers(2)) if right is None else right
    way = way if rng.random() < language.skill else 1 - way
    clauses.append(TEMPLATES[index].text(way))
    unused = [i for i in unused if i != index]
    used.append(index)
    previous = index
  return ' '.join(clauses)


def _pair(prompt: str, language: DemoLanguage, rng: np.random.Generator) -> dict[str, Any]:
  """Two responses, labelled by a Bradley-Terry judge of their gold rewards."""
  difference = 0.0
  while abs(difference) < language.gap:
    first, second = (
      _break(write_response(prompt, language, rng), language.broken, rng) for _ in range(2)
    )
    difference = gold(prompt, first) - gold(prompt, second)
  margin = language.sharpness * difference
  if rng.random() >= 1 / (1 + np.exp(-margin)):
    first, second = second, first
  return {'messages': _chat(prompt), 'chosen': first, 'rejected': second}


def _break(response: str, probability: float, rng: np.random.Generator) -> str:
  """The response with some clauses damaged: a word lost, or two neighbours swapped."""
  clauses = []
  for clause in split_clauses(response):
    words = clause.split(' ')
    if rng.random() < probability:
      at = int(rng.integers(len(words) - 2))
      if rng.random() < 0.5:
        del words[at]
      else:
        words[at : at + 2] = words[at + 1], words[at]
    clauses.append(' '.join(words))
  return ' '.join(clauses)


def _chat(prompt: str, response: str | None = None) -> list[dict[str, str]]:
  messages = [{'role': 'user', 'content': prompt}]
  return messages if response is None else [*messages, {'role': 'assistant', 'content': response}]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
  # mtime=0: equal rows make equal files, so that a second run finds its inputs unchanged.
  with gzip.GzipFile(path, 'wb', mtime=0) as file:
    file.write(''.join(json.dumps(row) + '\n' for row in rows).encode())


def write_tokenizer(directory: Path) -> None:
  """One token a word, with Llama-3's special tokens and chat template, in HF form."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = {'user', 'assistant', 'system', *ANIMALS, *PLACES}
  for text in (*QUESTIONS, *_CLAUSES):
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
