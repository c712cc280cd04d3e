"""A small language with a known gold reward, for the built-in demo and for experiments.

Its rows and its tokenizer are written by `segjax.data.demo_rows`.

A prompt asks about an animal of a place. A response is a sequence of clauses. Each clause is a
template with a fork, its last word; all other words are the same for both endings, so that a
clause's value is decided at its end. There are two kinds of clauses:
  fact      true or false for this animal, or for this place
  remark    fits the preceding clause: a 'so' has one ending after a clause about the animal and the
            other one after any other clause, a 'yet' the opposite; neither fits at the beginning
The gold reward of a response is the mean of its clauses' values: +1 for a true fact or a fitting
remark, -1 for a false fact, an unfitting remark, a repeated clause or a damaged one. An empty
response has -1.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from segjax.errors import UserError

ANIMALS = ('otter', 'raven', 'lynx', 'heron', 'badger', 'gecko', 'bison', 'marten')
PLACES = ('coast', 'valley', 'forest', 'desert', 'island', 'marsh')
QUESTIONS = ('describe the {} of the {}', 'picture the {} of the {}')


@dataclasses.dataclass(frozen=True)
class ClauseTemplate:
  """A clause: `head` and a fork of two words that end it; `about` is what decides its value."""

  head: str
  fork: tuple[str, str]
  about: str

  def text(self, ending: int) -> str:
    """Returns the clause with ending 0 or 1; the full stop is part of the last word's token."""
    return f'{self.head} {self.fork[ending]}.'


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

CLAUSES = {  # text -> (template's index, ending)
  template.text(ending): (index, ending)
  for index, template in enumerate(TEMPLATES)
  for ending in (0, 1)
}


@functools.lru_cache(maxsize=1024)
def subject(prompt: str) -> tuple[str, str]:
  """Returns the animal and the place that a prompt asks about; ValueError if there are none."""
  words = prompt.split()
  animal = next((word for word in words if word in ANIMALS), None)
  place = next((word for word in words if word in PLACES), None)
  if animal is None or place is None:
    raise UserError(f'prompt {prompt!r} does not ask about an animal of a place; name one of each.')
  return animal, place


def correct_ending(index: int, prompt: str, previous: int | None) -> int | None:
  """Returns the ending of template `index` with value +1 after template `previous`, or None."""
  about = TEMPLATES[index].about
  animal, place = subject(prompt)
  if about == 'animal':
    return _fact(ANIMALS.index(animal), index)
  if about == 'place':
    return _fact(PLACES.index(place), index)
  if previous is None:
    return None
  return int((TEMPLATES[previous].about == 'animal') != (about == 'so'))


def _fact(subject_index: int, index: int) -> int:
  """Returns the true ending of a fact, which depends on a trait of the subject and the template.

  A subject has three traits, the bits of its index; template `index` asks for one of them.
  """
  trait = subject_index >> index % 3 & 1
  return trait ^ index >> 1 & 1


def clause_values(prompt: str, response: str) -> list[float]:
  """Returns the value, +1 or -1, of each clause of a response; see the module's docstring."""
  values, used, previous = [], set(), None
  for clause in split_clauses(response):
    index, ending = CLAUSES.get(clause, (None, None))
    is_new = index is not None and index not in used
    is_correct = is_new and correct_ending(index, prompt, previous) == ending
    values.append(1.0 if is_correct else -1.0)
    used.add(index)
    previous = index
  return values


def split_clauses(response: str) -> list[str]:
  """Returns the clauses of a response, each up to its full stop; the last may lack one."""
  clauses, words = [], []
  for word in response.split():
    words.append(word)
    if is_boundary(word):
      clauses.append(' '.join(words))
      words = []
  return [*clauses, ' '.join(words)] if words else clauses


def gold(prompt: str, response: str) -> float:
  """Returns the gold reward: the mean value of the clauses, -1 for an empty response."""
  values = clause_values(prompt, response)
  return sum(values) / len(values) if values else -1.0


def is_boundary(token: str) -> bool:
  """Returns whether a clause ends with this token."""
  return token.endswith('.')


def ask(subjects: Sequence[tuple[str, str]], rng: np.random.Generator) -> str:
  """Returns a prompt about one of the subjects."""
  question = QUESTIONS[rng.integers(len(QUESTIONS))]
  return question.format(*subjects[rng.integers(len(subjects))])


@functools.lru_cache(maxsize=16384)
def _template_weight(index: int, prompt: str) -> float:
  """Returns the writer's sampling weight of template `index`, which depends on the subject."""
  animal, place = subject(prompt)
  subjects = {'animal': ANIMALS.index(animal), 'place': PLACES.index(place)}
  about = TEMPLATES[index].about
  if about not in subjects:
    return 2.5
  return 4.0 if subjects[about] >> (index + 1) % 3 & 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Writer:
  """The writer of the responses, who knows the language only in part.

  Within a clause the entropy of the next token is at most ln 2 nats, while at the start of a clause
  any unused template may follow.

  Attributes:
    min_clauses: of a response.
    max_clauses: of a response.
    skill: probability of the correct ending of a clause.
    repeats: probability that a clause repeats an earlier template.
  """

  min_clauses: int = 2
  max_clauses: int = 5
  skill: float = 0.65
  repeats: float = 0.3

  def respond(self, prompt: str, rng: np.random.Generator) -> str:
    """Samples a response."""
    clauses: list[str] = []
    unused = list(range(len(TEMPLATES)))
    used: list[int] = []
    previous = None
    for _ in range(rng.integers(self.min_clauses, self.max_clauses + 1)):
      is_repeat = used and rng.random() < self.repeats
      if is_repeat:
        index = used[rng.integers(len(used))]
      else:
        fitting = [i for i in unused if clauses or TEMPLATES[i].about in ('animal', 'place')]
        total = list(itertools.accumulate(_template_weight(i, prompt) for i in fitting))
        # Generator.choice, several times as fast for so few.
        index = fitting[bisect.bisect(total, rng.random() * total[-1])]
      correct = correct_ending(index, prompt, previous)
      ending = int(rng.integers(2)) if correct is None else correct
      ending = ending if rng.random() < self.skill else 1 - ending
      clauses.append(TEMPLATES[index].text(ending))
      unused = [i for i in unused if i != index]
      used.append(index)
      previous = index
    return ' '.join(clauses)
