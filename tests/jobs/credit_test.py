"""The credit job: clauses of responses, and the whole job on a random reward model."""

import json

import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.jobs import credit_methods
from segjax.types import Normalizer

REQUESTS = {'demo.language': 'requests'}
FUNCTIONS = {
  'evaluate.credit_fn': 'segjax.data.languages:true_credit',
  'evaluate.boundary_fn': 'segjax.data.demo_language:is_boundary',
}


@pytest.mark.campaign
def test_methods_are_compared_without_a_run_of_ppo(small, run, tmp_path, capsys):
  reward_model = _reward_model(small, run, tmp_path)
  changes = REQUESTS | FUNCTIONS | {'evaluate.samples_per_prompt': 2}
  changes['reward_model.path'] = reward_model
  results = run(small('demo', 'credit', **changes), tmp_path / 'run')['credit']
  assert set(results['methods']) == {*credit_methods.METHODS, 'shapley: segments'}
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
  paths |= FUNCTIONS | {'reward_model.path': reward_model}
  with pytest.raises(UserError, match='knows no credit of responses to prompts such as'):
    run(small('credit', **paths), tmp_path / 'run')
  with pytest.raises(UserError, match='credit_fn is empty, and the true credit of clauses needs'):
    run(small('credit', **paths | {'evaluate.credit_fn': ''}), tmp_path / 'run')
