"""The chat template and its date stay those of the first stage, in every later one."""

import json
import shutil

import pytest
from fixtures import runs
from fixtures.tokenizers import user

from segjax.data.tokenizer import load_tokenizer
from segjax.hf import imported, model_card
from segjax.jobs import pipeline
from segjax.jobs.registry import JOBS
from segjax.run import stage_record, template_date

OTHER = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}"
  '{% endfor %}{% if add_generation_prompt %}assistant {% endif %}'
)


@pytest.mark.campaign
def test_the_next_stage_reads_the_template_of_the_training(small, run, language, tmp_path):
  paths = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / 'sft.jsonl.gz'),
  }
  run(small('sft', **paths, **{'data.chat_template': OTHER}))
  trained = tmp_path / 'sft' / 'model'
  assert (trained / 'chat_template.jinja').read_text() == OTHER
  paths = {
    'policy.path': str(trained),
    'data.path': str(language / 'rows' / 'pairs.jsonl.gz'),
  }
  run(small('reward', **paths))
  reward = tmp_path / 'reward' / 'model'
  assert (reward / 'chat_template.jinja').read_text() == OTHER
  chat = load_tokenizer(str(trained))
  config = json.loads((reward / 'config.json').read_text())
  assert config['eos_token_id'] == chat.stop_ids[0]
  assert config['pad_token_id'] not in (None, *chat.stop_ids)


def test_the_model_of_the_demo_says_where_it_stops(language):
  chat = load_tokenizer(str(language / 'model'))
  for name in ('config.json', 'generation_config.json'):
    record = json.loads((language / 'model' / name).read_text())
    assert record['eos_token_id'] == chat.stop_ids[0]
    assert record['pad_token_id'] == chat.pad_id
    assert record['bos_token_id'] == chat.tokenizer.bos_token_id


@pytest.fixture
def dates(monkeypatch, fake_jobs):
  """The dates that stages were run with; dates.today(date) sets the clock."""

  class Dates(list):
    def today(self, date):
      monkeypatch.setattr(template_date, 'today', lambda: date)

  seen = Dates()

  def record(stage):
    seen.append((stage.name, stage.settings.data.template_date))
    stage.model_directory.mkdir(parents=True)
    (stage.model_directory / 'x').write_text('x')
    (stage.directory / 'held_out.json').write_text('[]')
    return {}

  fake_jobs(sft=record, reward=record)
  return seen


def test_the_date_of_the_first_start_is_that_of_the_run(small, run, language, dates, tmp_path):
  paths = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / 'sft.jsonl.gz'),
  }
  dates.today('2026-07-01')
  run(small('sft', **paths))
  dates.today('2026-07-02')
  run(small('sft', **paths))  # reused
  run(small('reward', **paths))
  assert dates == [('sft', '2026-07-01'), ('reward', '2026-07-01')]
  key = stage_record.stored_key(tmp_path / 'reward')
  assert key['settings']['data']['template_date'] == '2026-07-01'
  run(small('sft', **paths, **{'data.template_date': '2024-07-26'}))
  assert dates[2:] == [('sft', '2024-07-26')]


def test_an_interrupted_stage_keeps_its_date(small, run, language, dates, fake_jobs):
  paths = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / 'sft.jsonl.gz'),
  }

  def stop(stage):
    (stage.directory / 'checkpoints').mkdir()
    raise KeyboardInterrupt

  def resume(stage):
    assert (stage.directory / 'checkpoints').exists()
    assert stage.settings.data.template_date == '2026-07-01'
    stage.model_directory.mkdir()
    return {}

  dates.today('2026-07-01')
  fake_jobs(sft=stop)
  with pytest.raises(KeyboardInterrupt):
    run(small('sft', **paths))
  dates.today('2026-07-02')
  fake_jobs(sft=resume)
  run(small('sft', **paths))


def test_an_item_of_a_run_is_exported_with_the_template_of_the_run(language, tmp_path):
  template = '{{ strftime_now("%d %b %Y") }} ' + OTHER
  data = {'chat_template': template, 'template_date': '2024-07-26'}
  (tmp_path / '3' / 'manifest').mkdir(parents=True)
  (tmp_path / '3' / 'manifest' / 'metadata').write_text(
    json.dumps({'run': {'settings': {'data': data}}})
  )
  exported = imported.ExportSource(
    tmp_path / '3' / 'policy', language / 'model', 'policy', model_card.Card(), False
  )
  chat = imported.load_trained_tokenizer(exported)
  assert chat.prompt_text([user('a')]).startswith('26 Jul 2024 ')
  shutil.rmtree(tmp_path / '3')
  assert (
    imported.load_trained_tokenizer(exported).chat_template
    == (language / 'model' / 'chat_template.jinja').read_text()
  )


@pytest.mark.parametrize('stage, rows', [('reward', 'pairs'), ('ppo', 'prompts')])
def test_a_policy_with_another_template_is_said(
  small, language, one_device, tmp_path, stage, rows, capsys
):
  values = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / f'{rows}.jsonl.gz'),
    'data.chat_template': OTHER,
    'data.max_rows': 32,
    'reward_shaping.reward_model_weight': 0.0,
    'reward_shaping.reward_fn': 'operator:eq',
  }
  (prepared,) = pipeline.prepare(small(stage, **values), tmp_path, one_device)
  JOBS[stage].load(prepared)
  assert capsys.readouterr().out.count('was made with another chat template') == 1


@pytest.mark.campaign
def test_a_reward_model_with_another_template_reads_text(small, run, language, tmp_path, capsys):
  reward = runs.reward_model(
    language / 'model', tmp_path / 'rm', runs.Normalizer(), runs.Segmentation(entropy_threshold=1.0)
  )
  (reward / 'chat_template.jinja').write_text(OTHER)
  values = {
    'policy.path': str(language / 'model'),
    'reward_model.path': str(reward),
    'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
    'evaluate.num_printed': 0,
    'data.max_rows': 8,
    'reference.path': str(language / 'model'),
  }
  run(small('evaluate', **values), tmp_path / 'run')
  output = capsys.readouterr().out
  assert f'{reward} reads text, by its own tokenizer and chat template' in output
