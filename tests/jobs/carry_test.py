"""PPO that carries responses from one step to the next: the run, and its continuation."""

import json
import re
import sys

import pytest

from segjax.jobs import ppo_trainer
from segjax.report import metric_docs

CALLS = []


def short_words(prompt, response):
  """A custom reward that remembers its calls."""
  CALLS.append((prompt, response))
  return 1.0 / (1 + len(response))


@pytest.fixture
def values(small, language):
  return small(
    'ppo',
    **{
      'policy.path': str(language / 'model'),
      'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
      'reward_shaping.reward_fn': f'{__name__}:short_words',
      'reward_shaping.reward_model_weight': 0.0,
      'rollout.carry': True,
      'rollout.max_new_tokens': 40,
      'rollout.max_concurrent': 6,
      'ppo.max_steps': 4,
      'ppo.eval_every': 3,
      'ppo.holdout_fraction': 0.2,
      'ppo.policy_optimizer.learning_rate': 1e-2,
      'checkpoint.every_steps': 2,
      'report.every_steps': 1,
      'report.responses_per_rollout': 8,
    },
  )


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'ppo' / 'metrics.jsonl').read_text().splitlines()]


def letters(text):
  """Returns a text without special tokens, spaces and signs."""
  return re.sub(r'<\|.*?\|>|\W', '', text)


def prompt_and_letters(record):
  text = ''.join(segment['text'] for segment in record['segments'])
  return record['prompt'][-1]['content'], letters(text)


@pytest.mark.campaign
def test_a_resumed_run_goes_on_with_the_carried_responses(
  values, run, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(sys.modules[__name__], 'CALLS', [])
  run(values, tmp_path / 'uninterrupted')
  steps = metrics(tmp_path / 'uninterrupted')
  assert all(metric_docs.find_entry(name) for step in steps for name in set(step) - {'step'})
  assert steps[0]['rollout/carried_responses'] == 0 < steps[2]['rollout/carried_tokens']
  assert 0 < steps[3]['rollout/older_share'] < 1 <= steps[3]['rollout/age_max']
  # Carried tokens leave the comparison of sampling with training as it is.
  assert all(step['policy/initial_ratio_deviation'] < 1e-3 for step in steps)
  assert steps[3]['policy/ratio_max_deviation'] > 1e-3
  # Each response is logged with its own prompt.
  lines = (tmp_path / 'uninterrupted' / 'ppo' / 'samples.jsonl').read_text().splitlines()
  called = {(prompt, letters(response)) for prompt, response in CALLS}
  logged = {prompt_and_letters(json.loads(line)) for line in lines}
  assert len(logged) == 32 and logged <= called
  step = ppo_trainer.Trainer.step

  def interrupted(self, states, number):
    if number == 3:
      raise KeyboardInterrupt
    return step(self, states, number)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ppo_trainer.Trainer, 'step', interrupted)
    run(values, tmp_path / 'stopped')
  capsys.readouterr()
  run(values, tmp_path / 'stopped')
  assert 'resuming from step 2 of 4' in capsys.readouterr().out
  for name in ('model', 'critic'):
    weights = [
      (tmp_path / directory / 'ppo' / name / 'model.safetensors').read_bytes()
      for directory in ('uninterrupted', 'stopped')
    ]
    assert weights[0] == weights[1]
  for first, second in zip(steps, metrics(tmp_path / 'stopped'), strict=True):
    for name in first:
      if not name.startswith(('timing/', 'perf/')):
        assert first[name] == second[name], name
