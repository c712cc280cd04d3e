"""The credit job: clauses of responses, and the whole job on a random reward model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.data import demo_rows, study_languages
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.jobs import credit
from segjax.train.rollout import CollectedRollout
from segjax.types import Normalizer, Rollout

REQUESTS = {'demo.language': 'requests'}
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
  arrays = Rollout(*map(jnp.asarray, parts))
  rollout = CollectedRollout(arrays, ids, mask, finished, length)
  clauses = credit._find_clauses([PROMPT] * 3, rollout, tokenizer)
  assert clauses.of_token.tolist() == [
    [0] * 5 + [1] * 5 + [-1] * 2,  # the stop token belongs to the last clause
    [2] * 5 + [3] * 2 + [-1] * 5,
    [-1] * 12,
  ]
  assert [np.flatnonzero(row).tolist() for row in clauses.ends] == [[4, 8], [4, 6], []]
  assert clauses.response.tolist() == [0, 0, 1, 1]
  language = study_languages.LANGUAGES['requests']
  expected = [value for text in TEXTS for value in language.true_credit(PROMPT, text)]
  assert clauses.truth.tolist() == expected


@pytest.mark.campaign
def test_methods_are_compared_without_a_run_of_ppo(small, run, tmp_path, capsys):
  reward_model = _reward_model(small, run, tmp_path)
  changes = REQUESTS | {'reward_model.path': reward_model, 'evaluate.samples_per_prompt': 2}
  results = run(small('demo', 'credit', **changes), tmp_path / 'run')['credit']
  assert set(results['methods']) == {*credit.METHODS, 'shapley: segments'}
  record = json.loads((tmp_path / 'run' / 'credit' / 'credit.json').read_text())
  assert record == results['methods']
  assert record['spread: end_only']['on_deciding_token']['mean'] > 0.3
  assert 'Credit of' in capsys.readouterr().out


def _reward_model(small, run, tmp_path):
  run(small('demo', **REQUESTS), tmp_path)
  segmentation = Segmentation(boundary='delimiter')
  source, target = tmp_path / 'demo' / 'model', tmp_path / 'rm'
  return str(runs.reward_model(source, target, Normalizer(), segmentation))


@pytest.mark.campaign
def test_a_language_without_true_credit_is_refused(small, run, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"prompt": "describe the otter of the coast"}\n')
  reward_model = _reward_model(small, run, tmp_path)
  paths = {'policy.path': str(tmp_path / 'demo' / 'model'), 'data.path': str(prompts)}
  with pytest.raises(UserError, match='whose true credit is not known'):
    run(small('credit', **paths, **{'reward_model.path': reward_model}), tmp_path / 'run')
