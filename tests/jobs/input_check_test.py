"""What a dry run and a run check before the first stage starts."""

import json
import re
import shutil

import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.hf import reader
from segjax.jobs import dry_run, input_check, pipeline
from segjax.types import Normalizer

CHAT = {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}
PAIR = {'prompt': 'badger', 'chosen': 'clever.', 'rejected': 'dull.'}  # words of the language


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
  """Makes loading weights fail: a check reads none."""

  def refuse(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(reader, 'load_params', refuse)


@pytest.fixture
def write(tmp_path):
  """Returns a function to write rows to a file, and its path."""

  def write_rows(*rows):
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(tmp_path / 'rows.jsonl')

  return write_rows


@pytest.fixture
def check(small, one_device, tmp_path):
  """Returns a function to check the inputs of a run."""

  def check_stages(*stages, **values):
    settings = small(*stages, **{key.replace('__', '.'): value for key, value in values.items()})
    return input_check.check(pipeline.prepare(settings, tmp_path / 'run', one_device))

  return check_stages


def test_a_sound_run_passes_and_writes_nothing(check, language, write, tmp_path):
  model, pairs = str(language / 'model'), write(*[PAIR] * 9)
  reward = runs.reward_model(language / 'model', tmp_path / 'rm', Normalizer(), Segmentation())
  before = sorted(tmp_path.rglob('*'))
  paths = {'policy__path': model, 'data__path': pairs}
  assert check('sft', **paths) == []
  assert check('reward', **paths) == []
  assert check('sft', 'reward', 'normalizer', 'ppo', 'evaluate', **paths) == []
  assert check('ppo', **paths, reward_model__path=str(reward)) == []
  assert check('normalizer', **paths, reward_model__path=str(reward), reference__path=model) == []
  assert check('evaluate_reward', **paths, reward_model__path=str(reward)) == []
  assert check('demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate') == []
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
  'stages, rows, values, message',
  [
    (('sft',), [CHAT, {'nothing': 'x'}], {}, 'rows.jsonl, row 2: '),
    (('reward',), [CHAT], {}, 'row 1: no `chosen`'),
    (('sft', 'reward'), [CHAT], {}, 'row 1: no `chosen`'),
    (('ppo',), [{'text': 'x'}], {}, 'row 1: no prompt'),
    (('evaluate',), [{'text': 'x'}], {}, 'row 1: no prompt'),
    (('answers',), [PAIR], {}, 'rows.jsonl'),
    (('sft',), [CHAT], {'data__chat_template': 'no/such/file'}, 'no/such/file'),
    (('sft', 'ppo'), [CHAT], {'data__chat_template': '{% if %}'}, 'template'),
    (
      ('sft',),
      [CHAT],
      {'data__overlong_policy': 'error', 'data__max_length': 3, 'data__max_prompt_length': 1},
      'row 1: .* exceed data.max_length=3',
    ),
  ],
)
def test_what_a_job_would_refuse(check, language, write, stages, rows, values, message):
  paths = {'policy__path': str(language / 'model'), 'data__path': write(*rows)}
  paths |= {'reference__path': paths['policy__path'], 'reward_shaping__reward_model_weight': 0.0}
  with pytest.raises(UserError, match=message):
    check(*stages, **paths, **values, reward_shaping__reward_fn='operator:eq')


def test_damaged_files_of_a_model(check, language, write, tmp_path):
  model = shutil.copytree(language / 'model', tmp_path / 'policy')
  paths = {'policy__path': str(model), 'data__path': write(CHAT)}
  (model / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'tokenizer.json'):
    check('sft', **paths)
  (model / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=r'config.json'):
    check('sft', **paths)


@pytest.mark.parametrize(
  'file, content',
  [
    ('model.safetensors', b'cut'),
    ('model.safetensors', None),
    ('model.safetensors.index.json', b'{"weight_map": {"model.norm.weight": "../other"}}'),
  ],
)
@pytest.mark.parametrize('stage', ['sft', 'reward', 'ppo'])
def test_damaged_weights(check, language, write, tmp_path, stage, file, content):
  model = shutil.copytree(language / 'model', tmp_path / 'policy')
  (model / 'model.safetensors').unlink()
  if content:
    (model / file).write_bytes(content)
  rows = {'sft': CHAT, 'reward': PAIR, 'ppo': {'prompt': 'a'}}
  values = {'reward_shaping__reward_model_weight': 0.0, 'reward_shaping__reward_fn': 'operator:eq'}
  with pytest.raises(UserError, match=r'model\.safetensors'):
    check(stage, policy__path=str(model), data__path=write(rows[stage]), **values)


def test_rows_of_which_none_is_left(check, language, write):
  values = {'data__path': write({}), 'data__bad_rows': 'drop'}
  values |= {'reward_shaping__reward_model_weight': 0.0, 'reward_shaping__reward_fn': 'operator:eq'}
  with pytest.raises(UserError, match='none of its 1 rows'):
    check('ppo', policy__path=str(language / 'model'), **values)


def test_rows_dropped_at_the_front_are_no_error(check, language, write):
  identical = {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}
  data = write(*[identical] * 64, PAIR)
  assert check('reward', policy__path=str(language / 'model'), data__path=data) == []


def test_what_is_not_local_is_named(check, language, write, monkeypatch):
  monkeypatch.setattr('segjax.run.remote_inputs.cached_checkpoint', lambda name: None)
  assert check('sft', policy__path='owner/model', data__path='owner/rows') == [
    'owner/model',
    'owner/rows',
  ]
  with pytest.raises(UserError, match='no/such/file'):  # the tokenizer is local
    check(
      'sft',
      policy__path=str(language / 'model'),
      data__path='owner/rows',
      data__chat_template='no/such/file',
    )


def test_a_wrong_input_leaves_the_earlier_output(
  small, run, language, write, tmp_path, fake_jobs, monkeypatch
):
  """The template's path is wrong in one run, and a row that the check does not reach in another."""
  fake_jobs(sft=lambda stage: (stage.directory / 'model').mkdir() or {'loss': 1.0})
  paths = {'policy.path': str(language / 'model'), 'data.path': write(CHAT)}
  run(small('sft', **paths), tmp_path / 'w')
  monkeypatch.undo()  # the job itself from here on
  wrong = small('sft', **paths, **{'data.chat_template': 'no/such/file'})
  with pytest.raises(UserError, match='no/such/file'):
    run(wrong, tmp_path / 'w')
  with pytest.raises(UserError, match='row 100'):
    run(small('sft', **paths | {'data.path': write(*[CHAT] * 99, {})}), tmp_path / 'w')
  assert not (tmp_path / 'w' / 'sft.old').exists()
  assert (tmp_path / 'w' / 'sft' / 'model').exists()


def test_a_dry_run_prints_the_warnings_of_a_job(
  small, one_device, language, write, tmp_path, capsys
):
  paths = {'policy.path': str(language / 'model'), 'data.path': write(*[PAIR] * 32)}
  settings = small('reward', **paths, **{'reward.segmentation.entropy_threshold': 50.0})
  dry_run.run(settings, pipeline.prepare(settings, tmp_path / 'run', one_device))
  out = capsys.readouterr().out
  assert 'reward      warning: entropy_threshold=50 nats cuts nowhere' in out
  assert '32 rows' not in out
  # The policy of evaluate and its reference are one model here, as they are not in the run.
  settings = small('sft', 'ppo', 'evaluate', **paths)
  dry_run.run(settings, pipeline.prepare(settings, tmp_path / 'run', one_device))
  assert 'warning' not in capsys.readouterr().out


def test_a_dry_run_prints_what_differs(small, one_device, language, write, tmp_path, capsys):
  paths = {'policy.path': str(language / 'model'), 'data.path': write(*[CHAT] * 16)}
  settings = small('sft', **paths, **{'data.max_length': 2000})
  stages = pipeline.prepare(settings, tmp_path / 'run', one_device)
  dry_run.run(settings, stages)
  short = capsys.readouterr().out
  assert '--config.sft.batch_size=8\n' in short and '--config.stages=sft\n' in short
  assert 'gamma' not in short
  # 8 rows of 128 positions, not of 2,000 tokens.
  assert '1.02 k' in short
  assert 'rows are limited to 128 tokens, the model’s max_position_embeddings' in short
  dry_run.run(settings, stages, is_full=True)
  assert '"gamma": 1.0' in capsys.readouterr().out


def test_a_dry_run_counts_the_rows_of_all_sources(
  small, one_device, language, write, tmp_path, capsys
):
  data = write(*[CHAT] * 16)
  paths = {'policy.path': str(language / 'model'), 'data.path': f'{data}*2,{data}'}
  settings = small('sft', **paths, **{'sft.max_steps': 0})
  dry_run.run(settings, pipeline.prepare(settings, tmp_path / 'run', one_device))
  assert re.search(r'^sft .* 6 +768 ', capsys.readouterr().out, re.MULTILINE)  # 48 rows by 8


@pytest.mark.parametrize('weight', ['', '*2'])
def test_an_edited_source_of_several_reruns(
  small, run, language, write, tmp_path, fake_jobs, weight
):
  ran = []
  fake_jobs(sft=lambda stage: ran.append(stage.name) or {'loss': 1.0})
  (tmp_path / 'more.jsonl').write_text(json.dumps(CHAT))
  paths = {
    'policy.path': str(language / 'model'),
    'data.path': f'{write(CHAT)},{tmp_path}/more.jsonl{weight}',
  }
  for count in (1, 1, 2):
    (tmp_path / 'more.jsonl').write_text((json.dumps(CHAT) + '\n') * count)
    run(small('sft', **paths), tmp_path / 'w')
  assert ran == ['sft', 'sft']
