"""Runs with options: calibration, cache, custom reward, redistribution, reference_exact."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.data import demo_language
from segjax.errors import UserError
from segjax.jobs import ppo_trainer
from segjax.report import metric_docs
from segjax.run import preemption


def many_words(prompt, response):
  """A custom reward for long answers, loaded by its path."""
  return 0.1 * len(response.split())


CUSTOM_REWARD = f'{__name__}:many_words'


@pytest.fixture(scope='module')
def paths(language):
  """Returns a function that gives settings with the paths of the built-in language."""

  def make(rows):
    return {
      'policy.path': str(language / 'model'),
      'data.path': str(language / 'rows' / f'{rows}.jsonl.gz'),
      'network.max_position_embeddings': 128,
    }

  return make


def metrics(workdir, stage):
  lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line) for line in lines]
  for name in set().union(*steps) - {'step'}:
    assert metric_docs.find_entry(name), f'{name} has no entry in metric_docs'
  return steps


CALIBRATED = {
  'reward.threshold_search.target_segment_length': 3.0,
  'reward.threshold_search.num_samples': 16,
  'reward.threshold_search.batch_size': 16,
  'reward.threshold_search.max_new_tokens': 16,
  'reward.segmentation.aggregation': 'softmax',
  'reward.micro_batch_size': 4,
  'reward.num_epochs': 2,
  'reward.eval_every': 1,
}


@pytest.mark.campaign
def test_calibrated_and_cached_reward_model(small, run, paths, tmp_path, capsys):
  cache = {'reward.entropy_cache_dir': str(tmp_path / 'cache')}
  values = small('reward', 'normalizer', **paths('pairs'), **CALIBRATED, **cache)
  run(values, tmp_path / 'one')
  out = capsys.readouterr().out
  assert 'for a mean segment length of 3 tokens' in out and 'tokens per segment' in out
  calibration = json.loads((tmp_path / 'one' / 'reward' / 'calibration.json').read_text())
  stored = json.loads((tmp_path / 'one' / 'reward' / 'model' / 'segment_reward.json').read_text())
  assert stored['entropy_threshold'] == calibration['entropy_threshold'] > 0
  assert stored['aggregation'] == 'softmax'
  (selected,) = [
    p for p in calibration['curve'] if p['entropy_threshold'] == calibration['entropy_threshold']
  ]
  assert selected['segment_length'] == pytest.approx(3, rel=0.2)
  assert (tmp_path / 'one' / 'normalizer' / 'stage.json').exists()
  assert stored['normalizer']['kind'] == 'regression'

  # The same entropies from the file again: the same model.
  assert len(list((tmp_path / 'cache').glob('*.npy'))) == 1
  stages = small('reward', **paths('pairs'), **CALIBRATED, **cache)
  run(stages, tmp_path / 'two')
  assert 'entropies of the reference from' in capsys.readouterr().out
  run(small('reward', **paths('pairs'), **CALIBRATED), tmp_path / 'three')
  losses = [
    [line['reward_model/loss'] for line in metrics(tmp_path / name, 'reward')]
    for name in ('one', 'two', 'three')
  ]
  assert losses[0] == losses[1]
  assert all(0 <= line['eval/accuracy'] <= 1 for line in metrics(tmp_path / 'one', 'reward'))


CUTS = {
  # Of 112 tokens, an untrained model gives each about 1 / 112.
  'low_probability': {'reward.segmentation.probability_threshold': 1 / 112},
  'function': {'reward.segmentation.boundary_fn': 'segjax.data.demo_language:is_boundary'},
  'shuffled_entropy': CALIBRATED,
}


@pytest.mark.campaign
@pytest.mark.parametrize('boundary', CUTS)
def test_cuts_in_every_stage(small, run, paths, tmp_path, boundary):
  values = {'reward.segmentation.boundary': boundary, 'reward.entropy_cache_dir': 'run'}
  values |= CUTS[boundary]
  stages = small('reward', 'normalizer', 'ppo', 'evaluate', **paths('pairs'), **values)
  run(stages, tmp_path / 'run')
  stored = json.loads((tmp_path / 'run' / 'reward' / 'model' / 'segment_reward.json').read_text())
  assert stored['boundary'] == boundary and stored['normalizer']['kind'] == 'regression'
  caches = list((tmp_path / 'run' / 'reward' / 'entropies').glob('*.npy'))
  assert len(caches) == (boundary != 'function')
  (step, *_) = metrics(tmp_path / 'run', 'ppo')
  assert 1 < step['segments/per_response'] < step['response/length_mean']
  if boundary != 'function':
    return
  # The second run cuts by the scores of the model of the first, and learns from few tokens.
  jumps = {
    'reward_shaping.spread': 'entropy_weighted',
    'reward_shaping.credit': 'min',
    'ppo.learn_on': 'segment_starts',
    'reward_model.path': str(tmp_path / 'run' / 'reward' / 'model'),
    'reward_model.segmentation.boundary': 'score_jump',
    'reward_model.segmentation.jump_threshold': 0.1,
  }
  run(small('ppo', **paths('pairs'), **jumps), tmp_path / 'jumps')
  (other, *_) = metrics(tmp_path / 'jumps', 'ppo')
  assert 1 < other['segments/per_response'] < other['response/length_mean']
  share = other['segments/per_response'] / other['response/length_mean']
  assert other['policy/learned_share'] == pytest.approx(share)


def reward_losses(workdir):
  return [line['reward_model/loss'] for line in metrics(workdir, 'reward')]


@pytest.mark.campaign
def test_cached_entropies_are_those_of_the_step(small, run, paths, tmp_path):
  cache = {'reward.entropy_cache_dir': 'run'}
  run(small('reward', **paths('pairs'), **CALIBRATED, **cache), tmp_path / 'cached')
  assert len(list((tmp_path / 'cached' / 'reward' / 'entropies').glob('*.npy'))) == 1
  run(small('reward', **paths('pairs'), **CALIBRATED), tmp_path / 'computed')
  assert reward_losses(tmp_path / 'computed') == pytest.approx(
    reward_losses(tmp_path / 'cached'), rel=1e-5
  )


# One set for all tests of PPO here: any other value would compile every program again.
OPTIONS = {
  'critic.warmup_rollouts': 1,
  'ppo.skip_if_reward_above': 50.0,
  'ppo.max_steps': 3,
  'ppo.eval_every': 2,
  'ppo.holdout_fraction': 0.2,
  'evaluate.gold_reward_fn': CUSTOM_REWARD,
  'ppo.micro_batch_size': 2,
  'ppo.kl_placement': 'loss',
  'ppo.kl_estimator': 'k3',
  'ppo.kl_target': 1e-6,
  'ppo.gae_level': 'segment',
  'ppo.loss_aggregation': 'token',
  'ppo.dual_clip_ratio': 3.0,
  'ppo.clip_eps_high': 0.3,
  'ppo.value_clip_eps': 0.0,
  'ppo.entropy_coef': 0.01,
  'ppo.policy_optimizer.learning_rate': 1e-2,
}


CUSTOM_REWARD_ALONE = {
  'reward_shaping.reward_fn': CUSTOM_REWARD,
  'reward_shaping.reward_model_weight': 0.0,
  'reward_shaping.reward_fn_on_error': 'zero',
}


@pytest.mark.campaign
def test_custom_reward_alone_needs_no_reward_model(small, run, paths, tmp_path):
  report = {'report.every_steps': 2, 'report.responses_per_rollout': 3}
  values = {**paths('prompts'), **CUSTOM_REWARD_ALONE, **OPTIONS, **report}
  results = run(small('ppo', 'evaluate', **values))
  steps = metrics(tmp_path, 'ppo')
  assert 'policy/loss' not in steps[0] and 'critic/loss' in steps[0]
  assert 'policy/loss' in steps[1] and steps[1]['policy/initial_ratio_deviation'] < 1e-4
  assert steps[0]['objective/reward'] > 0
  assert [step['reward/failed_calls'] for step in steps] == [0, 0, 0]
  # The KL is far above its target once the policy has moved, so the coefficient rises.
  assert steps[2]['objective/kl_coef'] != steps[0]['objective/kl_coef']
  assert all(step['skipped_updates'] == 0 for step in steps)
  (evaluated,) = [step for step in steps if 'eval/reward' in step]
  assert evaluated['step'] == 1
  # The function is both the only reward and the true one.
  assert evaluated['eval/reward'] == pytest.approx(evaluated['eval/gold'], abs=1e-4)
  assert 'score' not in results['evaluate']['after']
  assert (tmp_path / 'report.html').read_text().count('<li class="done">') == 2
  lines = (tmp_path / 'ppo' / 'samples.jsonl').read_text().splitlines()
  responses = [json.loads(line) for line in lines]
  assert [response['step'] for response in responses][:6] == [0, 0, 0, 2, 2, 2]
  for response in responses:
    earned = sum(segment['reward'] for segment in response['segments'])
    assert earned == pytest.approx(response['totals']['reward'], abs=0.01)


@pytest.mark.campaign
def test_stopped_while_held_out_prompts_are_sampled(small, run, paths, tmp_path, monkeypatch):
  """The step is done and its old state donated: the new state is saved, and the run resumes."""
  values = small('ppo', **paths('prompts'), **CUSTOM_REWARD_ALONE, **OPTIONS)
  with monkeypatch.context() as patch, pytest.raises(preemption.PreemptedError, match='step 2 of'):
    patch.setattr(ppo_trainer, 'held_out_metrics', interrupted(ppo_trainer.held_out_metrics))
    run(values)
  assert run(values)['ppo']['steps'] == 3
  first, second, third = metrics(tmp_path, 'ppo')
  assert [first['step'], second['step'], third['step']] == [0, 1, 2]
  assert 'policy/loss' in second and 'eval/reward' not in second


@pytest.mark.campaign
def test_rollouts_of_int8_weights(small, run, paths, tmp_path, monkeypatch):
  """The ratio starts at 1 although others drew the tokens, and an interrupted run goes on."""
  overrides = {'rollout.weights_dtype': 'int8', 'ppo.importance_clip': 2.0}
  values = small('ppo', **paths('prompts'), **CUSTOM_REWARD_ALONE, **OPTIONS, **overrides)
  run(values, tmp_path / 'at once')
  with monkeypatch.context() as patch, pytest.raises(preemption.PreemptedError, match='step 2 of'):
    patch.setattr(ppo_trainer, 'held_out_metrics', interrupted(ppo_trainer.held_out_metrics))
    run(values, tmp_path / 'resumed')
  run(values, tmp_path / 'resumed')
  steps = metrics(tmp_path / 'at once', 'ppo')
  assert steps[1]['policy/initial_ratio_deviation'] < 1e-4
  assert all(1e-4 < step['rollout/logprob_mismatch'] < 0.1 for step in steps)
  assert all(0.9 < step['policy/importance_mean'] < 1.1 for step in steps[1:])
  assert all(step['policy/importance_clipfrac'] == 0 for step in steps[1:])
  again = metrics(tmp_path / 'resumed', 'ppo')
  for name in ('objective/reward', 'policy/loss', 'rollout/logprob_mismatch'):
    assert again[2][name] == steps[2][name]


def interrupted(function):
  """Wraps a function so that SIGTERM arrives in its second call; the first precedes training."""
  calls = []

  def call(*args):
    calls.append(args)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return function(*args)

  return call


def test_wrong_custom_reward_stops_before_anything_starts(small, run, paths):
  overrides = {'reward_shaping.reward_fn': 'no_such_module:f'}
  with pytest.raises(ValueError, match=r'config\.reward_shaping\.reward_fn'):
    run(small('ppo', **paths('prompts'), **overrides))


@pytest.fixture(scope='module')
def bandit(small, paths, one_device, tmp_path_factory):
  """An ordinary reward model, with the scalar normaliser of its scores."""
  from segjax.jobs import pipeline

  workdir = tmp_path_factory.mktemp('bandit')
  values = small(
    'reward', 'normalizer', **paths('pairs'), **{'reward.segmentation.granularity': 'bandit'}
  )
  pipeline.run(pipeline.prepare(values, workdir, one_device), workdir, 0.0)
  return str(workdir / 'reward' / 'model')


@pytest.mark.campaign
def test_bandit_model_redistributed_over_tokens(small, run, paths, bandit, tmp_path):
  overrides = {
    'reward_model.path': bandit,
    'reward_model.segmentation.granularity': 'token',
    'reward_shaping.redistribute': 'red',
    'reward_shaping.red_baseline': 'zero',
    'reward_shaping.reward_fn': f'{demo_language.__name__}:gold',
    'critic.init': 'reward_model',
    'ppo.critic_optimizer.learning_rate': 0.0,
  }
  run(small('ppo', **paths('prompts'), **overrides), tmp_path)
  assert all(step['skipped_updates'] == 0 for step in metrics(tmp_path, 'ppo'))
  # A critic initialised from the reward model keeps its head; at learning rate 0 it stays equal.
  critic = (tmp_path / 'ppo' / 'critic' / 'model.safetensors').read_bytes()
  assert critic == (Path(bandit) / 'model.safetensors').read_bytes()


def test_redistribution_of_a_bandit_is_refused(small, run, paths, language, tmp_path):
  segmentation = Segmentation(granularity='bandit')
  model = runs.reward_model(language / 'model', tmp_path / 'bandit', None, segmentation)
  overrides = {'reward_model.path': str(model), 'reward_model.normalizer': 'none'}
  overrides |= {'reward_shaping.redistribute': 'red'}
  with pytest.raises(ValueError, match='granularity=token or segment'):
    run(small('ppo', **paths('prompts'), **overrides))


@pytest.mark.campaign
def test_reference_exact_runs_through_all_stages(small, run, paths, tmp_path):
  overrides = {
    'reference_exact': True,
    'reward.segmentation.granularity': 'token',
    'reward_shaping.missing_eos_penalty': 'per_token',
    'reward_shaping.length_penalty': 'threshold',
  }
  values = small('reward', 'normalizer', 'ppo', **paths('pairs'), **overrides)
  run(values, tmp_path)
  steps = metrics(tmp_path, 'ppo')
  # Old log-probs are recomputed under the same mask, so the policy starts where it sampled.
  assert steps[0]['policy/initial_ratio_deviation'] < 1e-5
  assert abs(steps[0]['objective/kl']) < 1e-4
  stored = json.loads((tmp_path / 'reward' / 'model' / 'segment_reward.json').read_text())
  assert (stored['granularity'], stored['entropy_threshold']) == ('segment', 0.0)


@pytest.mark.campaign
def test_rollouts_beyond_the_bounds_are_skipped(small, run, paths, language, tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'many_words', lambda prompt, response: 1000.0)
  values = {**paths('prompts'), **CUSTOM_REWARD_ALONE, **OPTIONS}
  with pytest.raises(UserError, match='ppo made no update: all steps were skipped'):
    run(small('ppo', **values, max_skipped_steps=99), tmp_path)
  steps = metrics(tmp_path, 'ppo')
  assert all(step['skipped_updates'] > 0 for step in steps)
  assert len({step['objective/kl_coef'] for step in steps}) == 1
  assert not (tmp_path / 'ppo' / 'model').exists()
