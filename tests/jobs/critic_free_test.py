"""PPO without a critic: nothing of one is loaded, trained, saved, measured or planned."""

import json

import pytest

from segjax.jobs import ppo_trainer
from segjax.report import metric_docs
from segjax.rl.critic_free import ESTIMATORS


def vowels(prompt, response):
  """A custom reward at every vowel, so that responses to a prompt differ along their tokens."""
  return [(k + 1, 0.1) for k, letter in enumerate(response) if letter in 'aeiou']


@pytest.fixture
def values(small, language):
  """Returns a function that gives settings of a run with an estimator."""

  def make(estimator, *stages, **more):
    return small(
      *('ppo', *stages),
      **{
        'policy.path': str(language / 'model'),
        'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
        'reward_shaping.reward_fn': f'{__name__}:vowels',
        'reward_shaping.reward_model_weight': 0.0,
        'rollout.samples_per_prompt': 1 if estimator == 'reinforce_plus_plus' else 4,
        'ppo.estimator': estimator,
        'ppo.policy_optimizer.learning_rate': 1e-2,
        **more,
      },
    )

  return make


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'ppo' / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.campaign
@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_a_run_of_each_estimator(estimator, values, run, tmp_path, capsys):
  """The evaluation after it samples groups of its own, two responses in batches of eight."""
  run(values(estimator, 'evaluate', **{'evaluate.samples_per_prompt': 2}))
  steps = metrics(tmp_path)
  assert len(steps) == 2
  for step in steps:
    assert not step['skipped_updates'] and step['policy/grad_norm'] > 0
    assert step['objective/advantage_abs_max'] > 0
    assert not [name for name in step if 'critic' in name]
    assert all(metric_docs.find_entry(name) for name in step.keys() - {'step'})
  files = {path.name for path in (tmp_path / 'ppo').iterdir()}
  assert 'model' in files and not any('critic' in name for name in files)
  assert json.loads((tmp_path / 'ppo' / 'stage.json').read_text())['outputs'].keys() == {'model'}
  assert 'Critic' not in (tmp_path / 'report.html').read_text().partition('<script')[0]
  out = capsys.readouterr().out
  assert 'memory per device: policy' in out.replace('\N{NO-BREAK SPACE}', ' ')
  assert 'critic' not in out


@pytest.mark.campaign
def test_a_resumed_run_equals_an_uninterrupted_one(values, run, tmp_path, monkeypatch, capsys):
  settings = values('rloo', **{'ppo.max_steps': 3, 'checkpoint.every_steps': 1})
  run(settings, tmp_path / 'uninterrupted')
  step = ppo_trainer.Trainer.step

  def interrupted(self, states, number):
    if number == 2:
      raise KeyboardInterrupt
    return step(self, states, number)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ppo_trainer.Trainer, 'step', interrupted)
    run(settings, tmp_path / 'stopped')
  capsys.readouterr()
  run(settings, tmp_path / 'stopped')
  assert 'resuming from step 2 of 3' in capsys.readouterr().out
  weights = [
    (tmp_path / name / 'ppo' / 'model' / 'model.safetensors').read_bytes()
    for name in ('uninterrupted', 'stopped')
  ]
  assert weights[0] == weights[1]
