"""What a run leaves for people to look at: samples.jsonl, and report.html of all stages."""

import json

import pytest

from segjax.jobs import ppo


def many_words(prompt, response):
  """A rule that likes long answers; it is named by path below."""
  return 0.1 * len(response.split())


@pytest.fixture
def values(small, language):
  rows = language / 'rows' / 'prompts.jsonl.gz'
  named = {
    'policy.path': str(language / 'model'),
    'data.path': str(rows),
    'data.limit': 8,
    'shaping.reward_fn': f'{__name__}:many_words',
    'shaping.reward_model_weight': 0.0,
    'evaluate.gold': f'{__name__}:many_words',
    'reward_model.segmentation.entropy_threshold': 4.5,
    'checkpoint.every': 2,
    'ppo.steps': 4,
    'report.every': 2,
    'report.responses': 3,
    'report.evaluated': 4,
  }
  return lambda *stages, **more: small(*stages, **named | more)


def samples(workdir, stage):
  lines = (workdir / stage / 'samples.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_keeps_what_was_said(values, run, tmp_path):
  results = run(values('ppo', 'evaluate'), tmp_path)
  found = samples(tmp_path, 'ppo')
  assert [one['step'] for one in found] == [0, 0, 0, 2, 2, 2, 3, 3, 3]
  for one in found:
    for segment in one['segments']:
      assert segment['text'] == ''.join(segment['tokens'])
      assert len(segment['entropy']) == len(segment['tokens'])
      assert segment['score'] is None  # there is no reward model
    assert all(segment['entropy'][0] > 4.5 for segment in one['segments'][1:])
    earned = sum(segment['reward'] for segment in one['segments'])
    assert one['totals']['length'] <= 8 and earned == pytest.approx(
      one['totals']['reward'], abs=0.1
    )
  before, after = (
    [one for one in samples(tmp_path, 'evaluate') if one['model'] == name]
    for name in ('before', 'after')
  )
  assert [one['pair'] for one in before] == [one['pair'] for one in after] == [0, 2, 4, 7]
  assert [one['prompt'] for one in before] == [one['prompt'] for one in after]
  for one in after:
    said = ''.join(segment['text'] for segment in one['segments'])
    assert one['totals']['gold'] == pytest.approx(0.1 * len(said.split()))
  html = (tmp_path / 'report.html').read_text()
  assert html.count('<li class="done">') == len(results) == 2
  assert 'Gold reward, held out' in html


def test_samples_change_no_bit_and_none_stands_there_twice(values, run, tmp_path, monkeypatch):
  run(values('ppo'), tmp_path / 'whole')
  count, real = [], ppo.rollout

  def stopping(*args, **kwargs):
    count.append(1)
    if len(count) > 3:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ppo, 'rollout', stopping)
    run(values('ppo'), tmp_path / 'stopped')
  assert '<li class="stopped">' in (tmp_path / 'stopped' / 'report.html').read_text()
  run(values('ppo'), tmp_path / 'stopped')
  run(values('ppo', **{'report.every': 0}), tmp_path / 'silent')
  assert samples(tmp_path / 'stopped', 'ppo') == samples(tmp_path / 'whole', 'ppo')
  assert not (tmp_path / 'silent' / 'ppo' / 'samples.jsonl').exists()
  whole, stopped, silent = (
    (tmp_path / name / 'ppo' / 'model' / 'model.safetensors').read_bytes()
    for name in ('whole', 'stopped', 'silent')
  )
  assert whole == stopped == silent
