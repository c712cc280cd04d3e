"""The built-in languages: gold rewards by hand, and the writer against its own probabilities."""

import json

import numpy as np
import pytest

from segjax.config.choices import LANGUAGES
from segjax.data import demo_rows, study_languages
from segjax.data.languages import gold, make_language
from segjax.data.study_languages import clause_values
from segjax.errors import UserError

# The otter's index is 0, so that a fact's true ending is bit 1 of its template's index.
REQUEST = 'tell coat skill luck of the otter of the coast'
COAT, LIE = 'its winter coat feels soft.', 'its winter coat feels rough.'
SKILL, STRAY = 'young ones learn climbing.', 'most keepers feed it meat.'


@pytest.mark.parametrize(
  ('response', 'values'),
  [
    (COAT, [1 / 3]),
    (f'{COAT} {SKILL}', [1 / 3, 1 / 3]),
    (LIE, [-1 / 3]),
    (f'{COAT} {COAT}', [1 / 3, -1 / 6]),  # told before
    (f'{STRAY} {COAT}', [-1 / 6, 1 / 3]),
    ('its coat feels soft.', [-1 / 6]),  # damaged
    ('', []),
  ],
)
def test_requests_by_hand(response, values):
  assert clause_values(REQUEST, response) == pytest.approx(values)
  assert gold(REQUEST, response) == pytest.approx(sum(values))


@pytest.mark.parametrize(
  ('opening', 'values'),
  [
    ('now we speak of summer. ', [0, 1 / 3, -1 / 6]),
    ('now we speak of winter. ', [0, 0, 0]),
    ('', [0, 0]),  # a fact where the season belongs
  ],
)
def test_delayed_worth_is_decided_by_the_season(opening, values):
  assert clause_values(f'{REQUEST} in summer', f'{opening}{COAT} {STRAY}') == pytest.approx(values)


def test_one_content_decides_in_bifurcation():
  prompt = REQUEST.replace('tell', 'above all')
  assert clause_values(prompt, f'{STRAY} {COAT} {SKILL}') == [0, 1, 0]
  assert clause_values(prompt, f'{SKILL} {LIE} {COAT}') == [0, -1, 0]
  assert gold(prompt, SKILL) == 0


def test_gold_goes_by_the_prompt():
  # In the language describe it is the mean of the clauses, each +1 or -1.
  assert gold('describe the otter of the coast', f'{COAT} {LIE}') == 0
  with pytest.raises(UserError, match='does not ask'):
    study_languages.gold('tell coat', COAT)


@pytest.mark.parametrize('name', study_languages.LANGUAGES)
def test_writer_draws_by_its_probabilities(name):
  language, rng = study_languages.LANGUAGES[name], np.random.default_rng(0)
  prompt = language.ask(('lynx', 'marsh'), rng)
  assert sum(p for p, _ in language.next_clauses(prompt, ())) == pytest.approx(1)
  begin = [study_languages.OPENING.text(0)] if language.has_season else []
  # A clause of the writer is worth the mean of all that could be said, by draws as by the sum.
  before = gold(prompt, ' '.join(begin))
  expected = sum(
    p * gold(prompt, ' '.join([*begin, clause]))
    for p, clause in language.next_clauses(prompt, begin)
  )
  draws = []
  for _ in range(100):
    clauses = study_languages.split_clauses(language.respond(prompt, rng, begin))
    draws.append(gold(prompt, ' '.join(clauses[: len(begin) + 1])))
  assert np.mean(draws) == pytest.approx(expected, abs=4 * np.std(draws) / 100**0.5)
  assert before == 0


@pytest.mark.parametrize('name', study_languages.LANGUAGES)
def test_expected_gold_is_the_mean_of_responses(name):
  language, rng = study_languages.LANGUAGES[name], np.random.default_rng(0)
  prompt = language.ask(('heron', 'coast'), rng)
  assert study_languages.language_of(prompt) == language
  response = study_languages.split_clauses(language.respond(prompt, rng))
  for size in range(3):
    golds = [gold(prompt, language.respond(prompt, rng, response[:size])) for _ in range(40)]
    expected = language.expected_gold(prompt, response[:size])
    assert np.mean(golds) == pytest.approx(expected, abs=4 * np.std(golds) / 40**0.5 + 1e-9)


def test_true_credit_by_hand():
  language = study_languages.LANGUAGES['requests']
  # After two told contents the writer goes on with 2/3: strays, -1/6, with 0.375; else he tells the
  # last one, 0.1 on average, and is worth -1/12 then, since he can only stray.
  ahead = 2 / 3 * (0.375 * -1 / 6 + 0.625 * (0.1 - 1 / 12))
  credit = language.true_credit(REQUEST, f'{COAT} {SKILL} {STRAY}')
  assert credit[2] == pytest.approx(-1 / 6 - ahead)
  luck = 'stories always call it lucky.'
  credit = language.true_credit(REQUEST, f'{COAT} {SKILL} {luck}')
  assert credit[2] == pytest.approx(gold(REQUEST, luck) - 1 / 12 - ahead)
  # The season is said before anything is worth anything: 0.35 of what follows is at stake.
  delayed = study_languages.LANGUAGES['delayed']
  right, wrong = (f'now we speak of {season}.' for season in study_languages.SEASONS)
  prompt = f'{REQUEST} in summer'
  ahead = delayed.expected_gold(prompt, [right])
  assert ahead > 0.1
  assert delayed.true_credit(prompt, right) == pytest.approx([0.35 * ahead])
  assert delayed.true_credit(prompt, f'{wrong} {COAT}') == pytest.approx([-0.65 * ahead, 0])


def test_length_alone_wins_nothing_in_requests():
  language, rng = make_language('requests', 0, 0), np.random.default_rng(0)
  by_length = {}
  for _ in range(300):
    prompt = language.ask([('heron', 'valley'), ('gecko', 'marsh')], rng)
    response = language.respond(prompt, rng)
    by_length.setdefault(response.count('.'), []).append(gold(prompt, response))
  assert sorted(by_length) == [2, 3, 4]
  for values in by_length.values():
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5 + 0.02


@pytest.mark.parametrize('name', LANGUAGES)
def test_rows_are_in_the_vocabulary(name, tmp_path):
  language = make_language(name, 2, 5)
  demo_rows.write(tmp_path, language, demo_rows.RowCounts(sft_rows=9, pairs=2), seed=0)
  vocabulary = json.loads((tmp_path / 'tokenizer' / 'tokenizer.json').read_text())['model']['vocab']
  rng = np.random.default_rng(1)
  for _ in range(20):
    prompt = language.ask([('otter', 'coast'), ('bison', 'island')], rng)
    assert set(f'{prompt} {language.respond(prompt, rng)}'.split()) <= set(vocabulary)
