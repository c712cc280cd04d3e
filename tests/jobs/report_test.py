"""What a run leaves for people to look at: samples.jsonl, and report.html of all stages."""

import json

import pytest

from segjax.jobs import sampling


def many_words(prompt, response):
  """A rule that likes long answers; it is named by path below."""
  return 0.1 * len(response.split())


@pytest.fixture
def values(small, language):
  rows = language / 'rows' / 'prompts.jsonl.gz'
  named = {
    'policy.path': str(language / 'model'),
    'data.path': str(rows),
    'data.max_rows': 8,
    'reward_shaping.reward_fn': f'{__name__}:many_words',
    'reward_shaping.reward_model_weight': 0.0,
    'evaluate.gold_reward_fn': f'{__name__}:many_words',
    'reward_model.segmentation.entropy_threshold': 4.5,
    'checkpoint.every_steps': 2,
    'ppo.max_steps': 4,
    'report.every_steps': 2,
    'report.responses_per_rollout': 3,
    'report.eval_responses': 4,
  }
  return lambda *stages, **more: small(*stages, **named | more)


def samples(workdir, stage):
  lines = (workdir / stage / 'samples.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture
def stopped(run, tmp_path, monkeypatch):
  """Runs PPO, but the process is 'stopped' in its fourth step; checkpoints are every second."""

  def go(values, workdir):
    count, real = [], sampling.rollout

    def rollout(*args, **kwargs):
      count.append(1)
      if len(count) > 3:
        raise KeyboardInterrupt
      return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(sampling, 'rollout', rollout)
      run(values, workdir)

  return go


@pytest.mark.campaign
def test_a_run_keeps_what_was_said(values, run, stopped, tmp_path):
  stopped(values('ppo', 'evaluate'), tmp_path / 'kept')
  html = tmp_path / 'kept' / 'report.html'
  assert '<li class="stopped">' in html.read_text()
  run(values('ppo', 'evaluate'), tmp_path / 'kept')
  assert html.read_text().count('<li class="done">') == 2
  assert 'Gold reward, held out' in html.read_text()
  check_training(samples(tmp_path / 'kept', 'ppo'))
  check_evaluation(samples(tmp_path / 'kept', 'evaluate'))

  # Neither samples nor the page change a bit of what is learned.
  run(values('ppo', **{'report.every_steps': 0}), tmp_path / 'silent')
  assert not (tmp_path / 'silent' / 'ppo' / 'samples.jsonl').exists()
  kept, silent = (
    (tmp_path / name / 'ppo' / 'model' / 'model.safetensors').read_bytes()
    for name in ('kept', 'silent')
  )
  assert kept == silent


def check_training(found):
  assert [one['step'] for one in found] == [0, 0, 0, 2, 2, 2, 3, 3, 3]
  for one in found:
    for segment in one['segments']:
      assert segment['text'] == ''.join(segment['tokens'])
      assert len(segment['entropy']) == len(segment['tokens'])
      assert segment['score'] is None  # there is no reward model
    assert all(segment['entropy'][0] > 4.5 for segment in one['segments'][1:])
    earned = sum(segment['reward'] for segment in one['segments'])
    assert one['totals']['length'] <= 8
    assert earned == pytest.approx(one['totals']['reward'], abs=0.1)  # the stop token's KL


def check_evaluation(found):
  before, after = ([one for one in found if one['model'] == name] for name in ('before', 'after'))
  assert [one['pair'] for one in before] == [one['pair'] for one in after] == [0, 2, 4, 7]
  assert [one['prompt'] for one in before] == [one['prompt'] for one in after]
  for one in after:
    said = ''.join(segment['text'] for segment in one['segments'])
    assert one['totals']['gold'] == pytest.approx(0.1 * len(said.split()))
