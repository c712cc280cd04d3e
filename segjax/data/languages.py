"""The built-in languages by name, and the gold reward of a response in any of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from segjax.data import demo_language, study_languages

Subject = tuple[str, str]  # an animal and a place

_PROMPTS_PER_SUBJECT = 12  # of those that name contents, of which there are 120


class Language(NamedTuple):
  """How the rows of a language are written.

  Attributes:
    ask: (subjects, rng) -> a prompt about one of them.
    questions: (subject, rng) -> the prompts about it that PPO and the evaluation read.
    respond: (prompt, rng) -> a response of the language's writer.
    words: of prompts and responses, beside those of `demo_language`.
  """

  ask: Callable[[Sequence[Subject], np.random.Generator], str]
  questions: Callable[[Subject, np.random.Generator], list[str]]
  respond: Callable[[str, np.random.Generator], str]
  words: tuple[str, ...] = ()


def make_language(name: str, min_clauses: int, max_clauses: int) -> Language:
  """Returns a language of `config.choices.LANGUAGES`.

  Args:
    name: of the language.
    min_clauses: of a response, in the language describe.
    max_clauses: the same.
  """
  if name == 'describe':
    return Language(
      ask=demo_language.ask,
      questions=lambda subject, _: [q.format(*subject) for q in demo_language.QUESTIONS],
      respond=demo_language.Writer(min_clauses, max_clauses).respond,
    )
  language = study_languages.LANGUAGES[name]

  def ask(subjects, rng):
    return language.ask(subjects[rng.integers(len(subjects))], rng)

  def questions(subject, rng):
    return [language.ask(subject, rng) for _ in range(_PROMPTS_PER_SUBJECT)]

  return Language(ask, questions, language.respond, study_languages.WORDS)


def gold(prompt: str, response: str) -> float:
  """Returns the gold reward of a response, by the language of the prompt."""
  is_request = study_languages.is_request(prompt)
  return (study_languages if is_request else demo_language).gold(prompt, response)


def true_credit(prompt: str, response: str) -> list[float]:
  """Returns the true credit of each clause of a response; [] in describe, where it is not known."""
  if not study_languages.is_request(prompt):
    return []
  return study_languages.language_of(prompt).true_credit(prompt, response)
