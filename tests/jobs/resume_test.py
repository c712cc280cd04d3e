"""An interrupted stage, resumed: it gives the same bits as an uninterrupted one."""

import json

import pytest

from segjax.jobs import sft


@pytest.fixture
def values(small, language):
  """Settings of an SFT stage of five steps, with a checkpoint every two."""
  paths = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / 'sft.jsonl.gz'),
  }
  return lambda **more: small(
    'sft', **paths, **{'checkpoint.every_steps': 2, 'sft.max_steps': 5}, **more
  )


@pytest.fixture
def stop(run, monkeypatch):
  """Returns a function that runs SFT and interrupts it after some steps."""

  def run_and_stop(values, workdir, after):
    count, real = [], sft.sft_step

    def step(*args, **kwargs):
      count.append(1)
      if len(count) > after:
        raise KeyboardInterrupt
      return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(sft, 'sft_step', step)
      run(values, workdir)

  return run_and_stop


def test_resumed_stage_equals_an_uninterrupted_one(values, run, stop, tmp_path, capsys):
  uninterrupted = run(values(), tmp_path / 'uninterrupted')
  stop(values(), tmp_path / 'stopped', after=3)
  capsys.readouterr()
  resumed = run(values(), tmp_path / 'stopped')
  assert 'resuming from step 2 of 5' in capsys.readouterr().out
  weights = [
    (tmp_path / name / 'sft' / 'model' / 'model.safetensors').read_bytes()
    for name in ('uninterrupted', 'stopped')
  ]
  assert weights[0] == weights[1]
  assert resumed['sft']['loss'] == uninterrupted['sft']['loss']
  lines = (tmp_path / 'stopped' / 'sft' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [0, 1, 2, 3, 4]
  assert not (tmp_path / 'stopped' / 'sft' / 'checkpoints').exists()


@pytest.mark.campaign
def test_checkpoints_of_other_settings_are_not_resumed(values, run, stop, tmp_path, capsys):
  stop(values(), tmp_path, after=3)
  run(values(seed=1), tmp_path)
  out = capsys.readouterr().out
  assert 'runs again: seed changed' in out
  assert 'resuming from' not in out
  assert (tmp_path / 'sft.old' / 'checkpoints' / '2').exists()


@pytest.mark.campaign
def test_checkpoints_in_another_directory(values, run, stop, tmp_path, capsys):
  elsewhere = tmp_path / 'bucket'
  overrides = {'checkpoint.directory': f'{elsewhere}'}
  stop(values(**overrides), tmp_path / 'run', after=3)
  assert sorted(path.name for path in (elsewhere / 'sft').iterdir()) == ['2']
  assert not (tmp_path / 'run' / 'sft' / 'checkpoints').exists()
  capsys.readouterr()
  run(values(**overrides), tmp_path / 'run')
  assert 'resuming from step 2 of 5' in capsys.readouterr().out
  assert not (elsewhere / 'sft').exists()
