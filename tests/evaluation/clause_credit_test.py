"""Clauses of responses, and what dense rewards say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data import demo_language, demo_rows, languages, study_languages
from segjax.data.tokenizer import load_tokenizer
from segjax.evaluation.clause_credit import Clauses, clause_ends, clause_figures, make_clauses
from segjax.types import Rollout

PROMPT = 'tell coat skill luck of the otter of the coast'
TEXTS = (
  'its winter coat feels soft. young ones learn climbing.',
  'its winter coat feels rough. its winter',  # cut off
  '',
)


def test_clauses_are_those_of_the_true_credit(tmp_path):
  demo_rows.write_tokenizer(tmp_path, study_languages.WORDS)
  tokenizer = load_tokenizer(str(tmp_path))
  encoded = [tokenizer.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
  stop = tokenizer.tokenizer.eos_token_id
  encoded[0], encoded[2] = [*encoded[0], stop], [stop]
  mask = np.array([[t < len(ids) for t in range(12)] for ids in encoded])
  ids = np.array([[*ids, *[stop] * (12 - len(ids))] for ids in encoded])
  finished, length = np.array([True, False, True]), mask.sum(1)
  parts = ids[:, :1], length, ids, mask, finished, np.zeros(ids.shape, np.float32)
  rollout = Rollout(*(jnp.asarray(np.concatenate([x, x[:1]])) for x in parts))
  rollout = jax.tree.map(np.asarray, rollout)
  # The last prompt is of a language whose true credit is not known.
  prompts = [PROMPT] * 3 + ['describe the otter of the coast']
  ends = clause_ends(rollout, tokenizer.decode, demo_language.is_boundary)
  credit = [languages.true_credit(*pair) for pair in zip(prompts, (*TEXTS, TEXTS[0]), strict=True)]
  clauses = make_clauses(rollout.response_mask, ends, credit)
  assert clauses.of_token.tolist() == [
    [0] * 5 + [1] * 5 + [-1] * 2,  # the stop token belongs to the last clause
    [2] * 5 + [3] * 2 + [-1] * 5,
    [-1] * 12,
    [-1] * 12,
  ]
  assert [np.flatnonzero(row).tolist() for row in clauses.ends] == [[4, 8], [4, 6], [], []]
  assert clauses.response.tolist() == [0, 0, 1, 1]
  language = study_languages.LANGUAGES['requests']
  expected = [value for text in TEXTS for value in language.true_credit(PROMPT, text)]
  assert clauses.truth.tolist() == expected


def test_credit_on_the_ends_of_clauses_is_that_of_its_clauses():
  of_token = np.array([[0, 0, 1, 1, -1], [2, 2, 2, 3, 3]])
  ends = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]], bool)
  truth = np.array([1.0, -1.0, 0.5, -0.25])
  clauses = Clauses(of_token, ends, truth, np.array([0, 0, 1, 1]))
  reward = np.zeros((2, 5))
  reward[ends] = 3 * truth
  figures = clause_figures(reward, clauses, seed=0)
  assert figures['spearman']['mean'] == figures['sign']['mean'] == 1
  assert figures['error']['mean'] == pytest.approx(0, abs=1e-6)
  assert figures['on_deciding_token']['mean'] == 1
  # The return to go of the first response is 3 (1 - 1) = 0, then -3: its order is right too; of the
  # second 3 (0.5 - 0.25), then 3 (-0.25).
  assert figures['advantage_spearman']['mean'] == 1
  reward[0, 1], reward[0, 3] = -3, 3
  assert clause_figures(reward, clauses, seed=0)['spearman']['mean'] == 0


def test_one_reward_at_the_end_ranks_the_last_clause_alone():
  of_token = np.repeat(np.arange(3), 2)[None]
  ends = np.tile([False, True], 3)[None]
  clauses = Clauses(of_token, ends, np.array([1.0, 0.0, -1.0]), np.zeros(3, int))
  reward = np.zeros((1, 6))
  reward[0, -1] = 2.0
  figures = clause_figures(reward, clauses, seed=0)
  assert figures['spearman']['mean'] == pytest.approx(-(0.75**0.5))
  assert figures['on_deciding_token']['mean'] == 1
  assert figures['advantage_spearman']['mean'] == 0  # the same for all
