"""The registry: names and order of stages, and a job added by one object."""

from pathlib import Path

import pytest

from segjax.jobs import dry_run, pipeline
from segjax.jobs.job import POLICY, Input, Job
from segjax.jobs.registry import JOBS, check_stages


@pytest.mark.parametrize(
  'stages, message',
  [
    ((), 'config.stages is empty; use names out of demo, sft'),
    (('ppp',), "config.stages='ppp' is not one of .*; did you mean 'ppo'"),
    (('ppo', 'sft'), 'is not in the order of the jobs; use sft,ppo'),
    (('sft', 'sft'), 'is not in the order of the jobs; use sft'),
  ],
)
def test_stages_that_are_not_jobs_in_order(small, one_device, tmp_path, stages, message):
  with pytest.raises(ValueError, match=message):
    check_stages(stages)
  with pytest.raises(ValueError, match=message):
    pipeline.prepare(small(*stages), tmp_path, one_device)


def test_every_input_and_section_is_a_setting(small):
  settings = small('sft')
  for job in JOBS.values():
    assert all(hasattr(settings, section) for section in job.sections), job.name
    for item in job.inputs:
      value = pipeline.operator.attrgetter(item.key)(settings)
      assert isinstance(value, str | tuple), item.key
      for source in item.sources:
        assert source.startswith('config.') or source.partition('/')[0] in JOBS, source


def test_a_job_is_added_by_one_object(
  small, run, fake_jobs, one_device, monkeypatch, tmp_path, capsys
):
  """A job named 'count' that reads what sft wrote; nothing else knows its name."""

  def write_model(stage):
    stage.model_directory.mkdir()
    (stage.model_directory / 'weights').write_text('four')
    return {}

  def count(stage):
    letters = len((Path(stage.settings.policy.path) / 'weights').read_text())
    (stage.directory / 'letters.txt').write_text(str(letters))
    return {'letters': letters}

  job = Job(
    name='count',
    run=count,
    sections=('seed', 'policy'),
    inputs=(POLICY, Input('data.path')),
    outputs=('letters.txt',),
    batch_keys=('sft.batch_size',),
    summary=('letters',),
    print_table=lambda results: print(f'table: {results["letters"]}'),
    tokens_per_step=lambda settings: settings.sft.batch_size,
    num_steps=lambda settings, rows: 5,
  )
  monkeypatch.setitem(JOBS, 'count', job)
  fake_jobs(sft=write_model)
  (tmp_path / 'base').mkdir()
  (tmp_path / 'rows.jsonl').write_text('{}')
  paths = {'policy.path': str(tmp_path / 'base'), 'data.path': str(tmp_path / 'rows.jsonl')}
  settings = small('sft', 'count', **paths)

  assert run(settings, tmp_path / 'w')['count']['letters'] == 4
  out = capsys.readouterr().out
  assert 'letters 4' in out and 'table: 4' in out
  assert run(settings, tmp_path / 'w')['count']['letters'] == 4  # reused
  assert 'count       reused' in capsys.readouterr().out

  alone = small('count')
  stages = pipeline.prepare(alone, tmp_path / 'w', one_device)
  assert pipeline.missing_keys(stages[0]) == ['policy.path', 'data.path']
  dry_run.run(alone, stages)
  out = capsys.readouterr().out
  assert 'required but not set: --config.policy.path=..., for count' in out
  assert '1 x ?' in out and '40' in out  # 5 steps of 8 tokens
