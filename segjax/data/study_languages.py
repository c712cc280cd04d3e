"""Languages in which credit decides: a prompt asks for certain contents, each once.

They share the subjects and facts of `demo_language`. A prompt names contents and a subject, such as
'tell coat food luck of the otter of the coast'; a response is a sequence of clauses. A clause is
  told    about a content that is asked for and was not told before: true or false of the subject
  stray   about any other content, told before, damaged or out of place

  requests     gold = (true - false - stray / 2) / asked contents. The writer's clauses are worth 0
               on average, so that neither shorter nor longer wins by itself.
  delayed      the prompt names a season, and the first clause should too. With the right one the
               gold is that of `requests`, else 0: a clause is worth what an earlier one decided.
  bifurcation  one of the contents decides: gold is 1 if it is told truly, -1 if falsely, else 0.

The writer is a Markov chain over clauses, `next_clauses`: with it the worth of a clause can be
compared with all that could have been said in its place.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from segjax.data.demo_language import (
  ANIMALS,
  CLAUSES,
  PLACES,
  TEMPLATES,
  ClauseTemplate,
  correct_ending,
  split_clauses,
)
from segjax.errors import UserError

# Index of the template of each content: one for each trait of an animal and of a place.
CONTENTS = {'coat': 0, 'food': 1, 'skill': 2, 'weather': 8, 'luck': 9, 'weight': 10}
SEASONS = ('summer', 'winter')
OPENING = ClauseTemplate('now we speak of', SEASONS, 'season')
OPENINGS = {OPENING.text(ending): ending for ending in range(len(SEASONS))}
ASKED = 3  # contents of a prompt
MAX_CLAUSES = ASKED + 1  # that the writer says about contents; one or two fewer are as likely


@dataclasses.dataclass(frozen=True)
class Request:
  """What a prompt asks for: indices of templates, of which the first decides, and a season."""

  asked: tuple[int, ...]
  season: int | None
  has_key: bool
  subject: str


@dataclasses.dataclass(frozen=True)
class StudyLanguage:
  """A language of this module.

  Attributes:
    has_season: whether a season is named, and to be said first.
    has_key: whether one content decides alone.
    skill: probability that the writer tells the truth.
    key_skill: the same of the content that decides.
    told: probability that a clause is about a content that is asked for and not yet told.
  """

  has_season: bool = False
  has_key: bool = False
  skill: float = 0.65
  key_skill: float = 0.65
  told: float = 0.625  # told · (2 skill - 1) = (1 - told) / 2

  def ask(self, subject: tuple[str, str], rng: np.random.Generator) -> str:
    """Returns a prompt about an animal of a place, for contents in a random order."""
    contents = [list(CONTENTS)[index] for index in rng.permutation(len(CONTENTS))[:ASKED]]
    animal, place = subject
    season = f' in {SEASONS[rng.integers(len(SEASONS))]}' if self.has_season else ''
    verb = 'above all' if self.has_key else 'tell'
    return f'{verb} {" ".join(contents)} of the {animal} of the {place}{season}'

  def next_clauses(self, prompt: str, clauses: Sequence[str]) -> list[tuple[float, str | None]]:
    """Returns (probability, clause) of all that the writer may say next; None ends the response."""
    request, said = read_request(prompt), len(clauses)
    if request.season is not None:
      if not clauses:
        return _endings(OPENING, request.season, self.skill)
      said -= 1
    stop = _stop_probability(said)
    used = {CLAUSES[clause][0] for clause in clauses if clause in CLAUSES}
    new = [index for index in request.asked if index not in used]
    others = [index for index in CONTENTS.values() if index not in new]
    told = self.told if new else 0.0
    options: list[tuple[float, str | None]] = [(stop, None)] if stop else []
    for indices, share in ((new, told), (others, 1 - told)):
      for index in indices:
        skill = self.key_skill if request.has_key and index == request.asked[0] else self.skill
        correct = correct_ending(index, request.subject, None)
        weight = (1 - stop) * share / len(indices)
        options += [(weight * p, text) for p, text in _endings(TEMPLATES[index], correct, skill)]
    return [option for option in options if option[0] > 0]

  def respond(self, prompt: str, rng: np.random.Generator, begin: Sequence[str] = ()) -> str:
    """Samples a response of the writer that begins with these clauses."""
    clauses = list(begin)
    while True:
      probabilities, options = zip(*self.next_clauses(prompt, clauses), strict=True)
      clause = options[int(np.searchsorted(np.cumsum(probabilities), rng.random()))]
      if clause is None:
        return ' '.join(clauses)
      clauses.append(clause)

  def expected_gold(self, prompt: str, clauses: Sequence[str]) -> float:
    """Returns the mean gold reward of the writer's responses that begin with these clauses."""
    request = read_request(prompt)
    so_far = gold(prompt, ' '.join(clauses))
    if request.season is not None and not clauses:
      return self.skill * self._ahead(0, ASKED, False)
    said = len(clauses) - (request.season is not None)
    told = {CLAUSES[clause][0] for clause in clauses if clause in CLAUSES} & set(request.asked)
    has_key = request.has_key and request.asked[0] not in told
    counts = request.season is None or OPENINGS.get(clauses[0]) == request.season
    return so_far + counts * self._ahead(said, ASKED - len(told), has_key)

  def _ahead(self, said: int, new: int, has_key: bool) -> float:
    """Returns the mean of what the writer adds to the gold reward after `said` clauses.

    Args:
      said: clauses about contents.
      new: contents that are asked for and not yet told.
      has_key: whether the content that decides is one of them.
    """
    go_on = 1 - _stop_probability(said)
    if not go_on:
      return 0.0
    told = self.told if new else 0.0
    stray = 0.0 if self.has_key else -0.5 / ASKED
    total = (1 - told) * (stray + self._ahead(said + 1, new, has_key))
    if new:
      truth = 0.0 if self.has_key else (2 * self.skill - 1) / ASKED
      key = told / new if has_key else 0.0
      total += key * (2 * self.key_skill - 1 + self._ahead(said + 1, new - 1, False))
      total += (told - key) * (truth + self._ahead(said + 1, new - 1, has_key))
    return go_on * total

  def true_credit(self, prompt: str, response: str) -> list[float]:
    """Returns the advantage of each clause: expected gold after it less that before it.

    V(clauses 1 to j) - V(clauses 1 to j - 1), V = `expected_gold` under the writer: what a clause
    adds to the gold reward, less the mean of what could have been said in its place, more what it
    makes of the clauses that follow.
    """
    clauses = split_clauses(response)
    values = [self.expected_gold(prompt, clauses[:j]) for j in range(len(clauses) + 1)]
    return [after - before for before, after in itertools.pairwise(values)]


def _stop_probability(said: int) -> float:
  """Returns the probability that the writer ends after so many clauses about contents."""
  if said < MAX_CLAUSES - 2:
    return 0.0
  return 1 / (MAX_CLAUSES - said + 1) if said < MAX_CLAUSES else 1.0


LANGUAGES = {
  'requests': StudyLanguage(),
  'delayed': StudyLanguage(has_season=True, told=0.8),
  'bifurcation': StudyLanguage(has_key=True, key_skill=0.5),
}
WORDS = (*CONTENTS, *SEASONS, *OPENING.head.split(), *(f'{season}.' for season in SEASONS))
WORDS = (*WORDS, 'tell', 'above', 'all', 'of', 'the', 'in')


def _endings(template: ClauseTemplate, correct: int, skill: float) -> list[tuple[float, str]]:
  return [(skill if ending == correct else 1 - skill, template.text(ending)) for ending in (0, 1)]


@functools.lru_cache(maxsize=16384)
def read_request(prompt: str) -> Request:
  """Returns what a prompt asks for; UserError if it is not one of these languages."""
  words = prompt.split()
  asked = tuple(CONTENTS[word] for word in words if word in CONTENTS)
  subject = [next((w for w in words if w in names), None) for names in (ANIMALS, PLACES)]
  if not asked or None in subject:
    raise UserError(
      f'prompt {prompt!r} does not ask for contents of an animal of a place; name one of each.'
    )
  season = next((SEASONS.index(word) for word in words if word in SEASONS), None)
  return Request(asked, season, 'above' in words, ' '.join(subject))


def language_of(prompt: str) -> StudyLanguage:
  """Returns the language of a prompt."""
  request = read_request(prompt)
  if request.season is not None:
    return LANGUAGES['delayed']
  return LANGUAGES['bifurcation' if request.has_key else 'requests']


def is_request(prompt: str) -> bool:
  """Returns whether a prompt asks for contents, as those of this module do."""
  return any(word in CONTENTS for word in prompt.split())


def clause_values(prompt: str, response: str) -> list[float]:
  """Returns what each clause adds to the gold reward; their sum is `gold`."""
  request = read_request(prompt)
  values, used, counts = [], set(), 1.0
  for position, clause in enumerate(split_clauses(response)):
    if request.season is not None and not position:
      counts = float(OPENINGS.get(clause) == request.season)
      values.append(0.0)
      continue
    index, ending = CLAUSES.get(clause, (None, None))
    is_told = index in request.asked and index not in used
    used.add(index)
    is_true = is_told and ending == correct_ending(index, request.subject, None)
    if request.has_key:
      value = (2.0 * is_true - 1) if is_told and index == request.asked[0] else 0.0
    else:
      value = ((2.0 * is_true - 1) if is_told else -0.5) / len(request.asked)
    values.append(counts * value)
  return values


def gold(prompt: str, response: str) -> float:
  """Returns the gold reward, see the module's docstring."""
  return sum(clause_values(prompt, response), 0.0)
