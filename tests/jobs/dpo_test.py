"""DPO on pairs, and its policy as a dense reward of PPO, through the real jobs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import runs
from numpy.testing import assert_allclose

from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.errors import UserError
from segjax.jobs import ppo_trainer
from segjax.jobs.pipeline import connect_stage
from segjax.jobs.registry import JOBS
from segjax.model import heads
from segjax.report import metric_docs
from segjax.rl import oracle_lm_rewards
from segjax.run import models, weights
from segjax.train.rollout_rows import concat_prompt_response

STAGES = ('dpo', 'ppo', 'evaluate')
COEF, CLIP = 0.05, 0.005


@pytest.fixture(scope='module')
def values(language):
  rows = language / 'rows'
  return {
    'policy.path': str(language / 'model'),
    'dpo.data.path': str(rows / 'pairs.jsonl.gz'),
    'ppo.data.path': str(rows / 'prompts.jsonl.gz'),
    'evaluate.data.path': str(rows / 'held_out.jsonl.gz'),
    'dpo.batch_size': 8,
    'dpo.num_epochs': 2,
    'dpo.eval_every': 3,
    'dpo.holdout_fraction': 0.25,
    'dpo.label_smoothing': 0.1,
    'dpo.micro_batch_size': 4,
    'dpo.optimizer.learning_rate': 1e-2,
    'ppo.policy_optimizer.learning_rate': 1e-2,
    'ppo.critic_optimizer.learning_rate': 1e-2,
    'reward_shaping.reward_model_weight': 0.0,
    'reward_shaping.lm_reward.kind': 'implicit',
    'reward_shaping.lm_reward.coef': COEF,
    'reward_shaping.lm_reward.clip': CLIP,
  }


def metrics(workdir, stage):
  lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def logprobs(directory, rollout, settings, mesh):
  """Returns the log-prob of each token of the responses, by one plain forward pass."""
  config = models.load_network_config(Path(directory), settings.runtime, mesh, print)
  loader = weights.Weights(settings.runtime, mesh)
  params = loader.frozen(Path(directory), config, 'language')
  ids = concat_prompt_response(rollout)
  everything, _ = jax.jit(heads.token_logprobs, static_argnames='config')(params, ids, config)
  return [
    np.asarray(row)[start : start + rollout.response_ids.shape[1]].tolist()
    for row, start in zip(everything, np.asarray(rollout.prompt_length), strict=True)
  ]


@pytest.mark.campaign
def test_ppo_learns_from_the_implicit_rewards_of_dpo(
  small, run, values, one_device, tmp_path, monkeypatch, capsys
):
  seen, make = [], ppo_trainer.Trainer._update

  def watched(self, states, collected, *rest):
    seen.append(jax.device_get(collected.experience))
    return make(self, states, collected, *rest)

  monkeypatch.setattr(ppo_trainer.Trainer, '_update', watched)
  settings = small(*STAGES, **values)
  results = run(settings)
  out = ' '.join(capsys.readouterr().out.split())
  assert 'implicit rewards of a language model by token' in out
  steps = metrics(tmp_path, 'dpo')
  assert steps[0]['dpo/loss'] == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference
  assert steps[-1]['dpo/loss'] < steps[0]['dpo/loss'] and 'eval/accuracy' in steps[2]
  assert 0 <= results['dpo']['held_out_accuracy'] <= 1
  # By hand: the first rollout's reward of each token, from the two models alone.
  experience = seen[0]
  rollout = jax.tree.map(jnp.asarray, experience.rollout)
  model, reference = (
    logprobs(path, rollout, settings, one_device)
    for path in (tmp_path / 'dpo' / 'model', settings.policy.path)
  )
  mask = np.asarray(rollout.response_mask)
  for row in range(len(mask)):
    expected = oracle_lm_rewards.token_rewards(
      model[row], reference[row], mask[row].tolist(), COEF, CLIP
    )
    assert_allclose(experience.reward[row], expected, atol=1e-6)
  assert np.abs(experience.reward).max() == pytest.approx(CLIP)  # some were clipped
  assert (np.abs(experience.reward)[mask] < CLIP).any()
  logged = metrics(tmp_path, 'ppo')
  assert logged[0]['objective/lm_reward'] == pytest.approx(
    experience.reward.sum(axis=1).mean(), abs=1e-6
  )
  for name in set().union(*steps, *logged) - {'step'}:
    assert metric_docs.find_entry(name), f'{name} has no entry in metric_docs'
  assert 'score' not in results['evaluate']['after']
  # A changed model runs PPO again; an unchanged one does not.
  capsys.readouterr()
  run(settings)
  assert capsys.readouterr().out.count('reused from') == 3
  run(small(*STAGES, **values | {'dpo.beta': 0.2}))
  out = capsys.readouterr().out
  assert 'dpo         runs again' in out and 'ppo         runs again' in out


@pytest.mark.campaign
def test_dpo_with_adapters_shares_the_base_with_ppo(small, run, values, tmp_path, monkeypatch):
  seen, step = [], ppo_trainer.Trainer.step

  def watched(self, states, number):
    params = self._params(states)
    base = params['reference']['backbone']['embedding']
    seen.append(all(tree['backbone']['embedding'] is base for tree in params.values()))
    assert 'reward_lm' in self.collector.recipe.one_base
    return step(self, states, number)

  monkeypatch.setattr(ppo_trainer.Trainer, 'step', watched)
  lora = {'lora.rank': 2, 'lora.learning_rate_factor': 1.0, 'dpo.packing_length': 96}
  teacher = {'reward_shaping.lm_reward.kind': 'teacher', 'ppo.gamma': 0.0}
  run(small('dpo', 'ppo', **values | lora | teacher))
  assert seen == [True] * 2
  assert (tmp_path / 'dpo' / 'model' / 'adapter_model.safetensors').exists()
  (first, *_) = metrics(tmp_path, 'ppo')
  assert np.isfinite(first['objective/lm_reward']) and first['skipped_updates'] == 0


def test_dpo_provides_the_model_where_it_is_read(small, values, tmp_path):
  on = connect_stage(JOBS['ppo'], small(*STAGES, **values), tmp_path)
  assert on.reward_shaping.lm_reward.path == str(tmp_path / 'dpo' / 'model')
  off = {key: value for key, value in values.items() if 'reward_shaping' not in key}
  settings = connect_stage(JOBS['ppo'], small('dpo', 'ppo', **off), tmp_path)
  assert settings.reward_shaping.lm_reward.path == ''


def test_another_tokenizer_is_refused_before_weights(small, run, values, tmp_path):
  source = Path(values['policy.path'])
  other = runs.with_template(source, tmp_path / 'other')
  tokenizer = json.loads((other / 'tokenizer.json').read_text())
  vocabulary = tokenizer['model']['vocab']
  first, second, *_ = vocabulary
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  (other / 'tokenizer.json').write_text(json.dumps(tokenizer))
  assert tokenizer_fingerprint(str(other)) != tokenizer_fingerprint(str(source))
  path = {'reward_shaping.lm_reward.path': str(other), 'data.path': values['ppo.data.path']}
  with pytest.raises(UserError, match=r'the tokenizers of .*other and .* differ'):
    run(small('ppo', **values | path))


def test_a_kind_without_a_model_is_refused(small, run, values):
  with pytest.raises(UserError, match=r'config\.reward_shaping\.lm_reward\.path is empty'):
    run(small('ppo', **values))
