"""samples.jsonl of a stage, and report.html of all stages."""

import json

import pytest

from segjax.train import collect


def many_words(prompt, response):
  """A custom reward for long answers, loaded by its path."""
  return 0.1 * len(response.split())


@pytest.fixture
def values(small, language):
  rows = language / 'rows' / 'prompts.jsonl.gz'
  overrides = {
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
  return lambda *stages, **more: small(*stages, **overrides | more)


def samples(workdir, stage):
  lines = (workdir / stage / 'samples.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture
def stopped(run, tmp_path, monkeypatch):
  """Returns a function that runs PPO and interrupts its fourth step; checkpoints are every 2."""

  def run_and_stop(values, workdir):
    count, real = [], collect.rollout

    def rollout(*args, **kwargs):
      count.append(1)
      if len(count) > 3:
        raise KeyboardInterrupt
      return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(collect, 'rollout', rollout)
      run(values, workdir)

  return run_and_stop


@pytest.mark.campaign
def test_a_resumed_run_has_all_samples(values, run, stopped, tmp_path):
  stopped(values('ppo', 'evaluate'), tmp_path / 'resumed')
  html = tmp_path / 'resumed' / 'report.html'
  assert '<li class="stopped">' in html.read_text()
  run(values('ppo', 'evaluate'), tmp_path / 'resumed')
  assert html.read_text().count('<li class="done">') == 2
  assert 'held-out prompts, after PPO' in html.read_text()
  check_training(samples(tmp_path / 'resumed', 'ppo'))
  check_evaluation(samples(tmp_path / 'resumed', 'evaluate'))

  # Neither samples nor the page change a bit of what is learned.
  run(values('ppo', **{'report.every_steps': 0}), tmp_path / 'silent')
  assert not (tmp_path / 'silent' / 'ppo' / 'samples.jsonl').exists()
  resumed, silent = (
    (tmp_path / name / 'ppo' / 'model' / 'model.safetensors').read_bytes()
    for name in ('resumed', 'silent')
  )
  assert resumed == silent


def check_training(records):
  assert [record['step'] for record in records] == [0, 0, 0, 2, 2, 2, 3, 3, 3]
  for record in records:
    for segment in record['segments']:
      assert segment['text'] == ''.join(segment['tokens'])
      assert len(segment['entropy']) == len(segment['tokens'])
      assert segment['score'] is None  # there is no reward model
    assert all(segment['entropy'][0] > 4.5 for segment in record['segments'][1:])
    earned = sum(segment['reward'] for segment in record['segments'])
    assert record['totals']['length'] <= 8
    assert earned == pytest.approx(record['totals']['reward'], abs=0.1)  # the stop token's KL


def check_evaluation(records):
  before, after = (
    [record for record in records if record['model'] == name] for name in ('before', 'after')
  )
  assert (
    [record['pair'] for record in before] == [record['pair'] for record in after] == [0, 2, 4, 7]
  )
  assert [record['prompt'] for record in before] == [record['prompt'] for record in after]
  for record in after:
    text = ''.join(segment['text'] for segment in record['segments'])
    assert record['totals']['gold'] == pytest.approx(0.1 * len(text.split()))
