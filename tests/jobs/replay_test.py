"""`segjax replay`: a step of a finished run, computed again."""

import json

import pytest

from segjax.errors import UserError
from segjax.jobs import replay

STAGES = ('demo', 'sft', 'reward', 'normalizer', 'ppo')


def test_a_run_without_the_step_is_refused(tmp_path):
  with pytest.raises(UserError, match='has no steps'):
    replay.replay(tmp_path, 1)
  (tmp_path / 'ppo').mkdir()
  (tmp_path / 'ppo' / 'metrics.jsonl').write_text('{"step": 0, "policy/loss": 1.0}\n')
  with pytest.raises(UserError, match='has no step 2; name one from 1 to 1'):
    replay.replay(tmp_path, 2)
  with pytest.raises(UserError, match='does not know how ppo was run'):
    replay.replay(tmp_path, 1)


def test_what_differs_is_said(capsys):
  same = {'policy/loss': 0.5, 'weights/policy': 7.0}
  assert replay.report(replay.Comparison([], same, same), 'step 1 of ppo') == 0
  assert 'the same to the bit: weights of policy, and 1 metrics' in capsys.readouterr().out
  other = same | {'weights/policy': 8.0}
  changed = replay.Comparison(['content of data.path'], same, other)
  assert replay.report(changed, 'step 1 of ppo') == 1
  out = capsys.readouterr().out
  assert 'not as the run had it: content of data.path' in out and '1 of 2 differ' in out
  assert 'policy/loss' not in out


@pytest.mark.campaign
def test_steps_are_computed_again(small, run, one_device, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(replay, 'make_mesh', lambda *_: one_device)  # as `run` has
  run(small(*STAGES, **{'ppo.max_steps': 3}), tmp_path)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  for name, steps in (('sft', [1]), ('reward', [2]), ('ppo', [2, 3])):
    for step in steps:
      compared = replay.replay(tmp_path, step, name)
      assert not compared.changed and not compared.differing()
      assert any(key.startswith('weights/') for key in compared.before)
      assert 'timing/step' not in compared.before
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == files
  metrics = tmp_path / 'ppo' / 'metrics.jsonl'
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  rows[1]['weights/policy'] += 1
  metrics.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  prompts = tmp_path / 'demo' / 'rows' / 'prompts.jsonl.gz'
  assert replay.main([str(tmp_path), '2']) == 1
  assert '1 of ' in capsys.readouterr().out
  prompts.rename(prompts.with_suffix('.gone'))
  assert replay.main([str(tmp_path), '2']) == 1
  assert 'prompts' in capsys.readouterr().err
