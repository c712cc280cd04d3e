"""The reward job on labels of steps."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from segjax.config.settings import Data
from segjax.errors import UserError
from segjax.hf import reader
from segjax.jobs import dry_run, input_check, pipeline
from segjax.run.labelled_rows import count_forms
from segjax.train import reward_spec


def write_rows(path, count=24):
  """Writes answers whose good steps end in '.', each step with a label."""
  rng, rows = np.random.default_rng(0), []
  for number in range(count):
    text, steps = '', []
    for _ in range(int(rng.integers(1, 4))):
      good = bool(rng.random() < 0.5)
      text += ('the bear sleeps ' if good else 'the the bear ') + ('. ' if good else '')
      steps.append([len(text.rstrip()), int(good)])
    rows.append({'prompt': f'question {number}', 'response': text.rstrip(), 'steps': steps})
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows


def write_pairs(path, count=28):
  """Writes pairs whose better answer ends in '.'."""
  worse = [f'the the {"bear " * (number % 4)}' for number in range(count)]
  rows = [
    {'prompt': f'pair {number}', 'chosen': 'the bear sleeps .', 'rejected': text}
    for number, text in enumerate(worse)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def read_metrics(path):
  return [json.loads(line) for line in path.read_text().split('\n')[:-1]]


@pytest.fixture
def inputs(language, tmp_path):
  write_rows(tmp_path / 'steps.jsonl')
  write_pairs(tmp_path / 'pairs.jsonl')
  return {
    **dict.fromkeys(('policy.path', 'reference.path'), str(language / 'model')),
    'data.path': str(tmp_path / 'steps.jsonl'),
    'reward.segmentation.boundary': 'fixed_length',
  }


@pytest.mark.campaign
@pytest.mark.parametrize(
  'values', [{}, {'reward.packing_length': 96, 'reward.micro_batch_tokens': 512, 'lora.rank': 2}]
)
def test_a_reward_model_of_step_labels(small, run, inputs, values, tmp_path):
  values = {'reward.max_steps': 20, 'reward.optimizer.learning_rate': 1e-2} | values
  values |= {'reward.eval_every': 10}
  run(small('reward', **inputs | values))
  lines = read_metrics(tmp_path / 'reward/metrics.jsonl')
  losses = [line['reward_model/loss'] for line in lines]
  assert np.isfinite(losses).all()
  if 'lora.rank' not in values:  # rank 2 learns little in 20 steps
    assert losses[-1] < losses[0]
  assert 0 <= lines[-1]['eval/accuracy'] <= 1
  results = json.loads((tmp_path / 'reward/stage.json').read_text())['results']
  held_out = json.loads((tmp_path / 'reward/held_out.json').read_text())
  rows = write_rows(tmp_path / 'again.jsonl')
  assert results['held_out_steps'] == sum(len(rows[i]['steps']) for i in held_out) > 0
  assert results['held_out_rows'] == len(held_out) and 0 <= results['held_out_accuracy'] <= 1
  model = tmp_path / 'reward/model'
  assert reward_spec.read_spec(model).segmentation.boundary == 'fixed_length'
  assert reader.has_scalar_head(model, reader.load_config(model))


def both(tmp_path):
  return ','.join(str(tmp_path / name) for name in ('pairs.jsonl', 'steps.jsonl'))


@pytest.mark.campaign
@pytest.mark.parametrize(
  'values', [{}, {'reward.packing_length': 96, 'reward.micro_batch_tokens': 512, 'lora.rank': 2}]
)
def test_a_reward_model_of_pairs_and_step_labels(small, run, inputs, values, tmp_path):
  values = {'data.path': both(tmp_path), 'reward.max_steps': 20, 'reward.eval_every': 10} | values
  values |= {'reward.optimizer.learning_rate': 1e-2}
  fitted = run(small('reward', 'normalizer', **inputs | values))['normalizer']
  assert fitted['segments'] > 0  # of the pairs in the same rows
  lines = read_metrics(tmp_path / 'reward/metrics.jsonl')
  for name in ('loss', 'step_loss'):
    losses = [line[f'reward_model/{name}'] for line in lines]
    assert np.isfinite(losses).all()
    if 'lora.rank' not in values:  # rank 2 learns little in 20 steps
      assert losses[-1] < losses[0]
  assert 0 <= lines[-1]['eval/step_accuracy'] <= 1 and 0 <= lines[-1]['eval/accuracy'] <= 1
  assert ('perf/packing_efficiency' in lines[-1]) == ('lora.rank' in values)
  if 'reward.packing_length' not in values:  # where the shapes depend on the lengths
    assert lines[1]['perf/num_compiles'] == lines[8]['perf/num_compiles']
  results = json.loads((tmp_path / 'reward/stage.json').read_text())['results']
  held_out = json.loads((tmp_path / 'reward/held_out.json').read_text())
  assert held_out == sorted(held_out)
  steps = [index - 28 for index in held_out if index >= 28]  # rows of the second file
  assert results['held_out_pairs'] == len(held_out) - len(steps) > 0
  rows = write_rows(tmp_path / 'again.jsonl')
  assert results['held_out_steps'] == sum(len(rows[i]['steps']) for i in steps) > 0
  for name in ('loss', 'accuracy', 'margin', 'step_loss', 'step_accuracy'):
    assert np.isfinite(results[f'held_out_{name}'])


@pytest.mark.campaign
def test_without_weight_the_model_is_that_of_the_pairs(small, run, inputs, tmp_path):
  networks = []
  for name, values in (
    ('pairs', {'data.path': str(tmp_path / 'pairs.jsonl')}),
    ('both', {'data.path': both(tmp_path), 'reward.steps_weight': 0.0}),
  ):
    run(small('reward', **inputs | values), tmp_path / name)
    networks.append(load_file(tmp_path / name / 'reward/model/model.safetensors'))
  for name, expected in networks[0].items():
    np.testing.assert_allclose(networks[1][name], expected, atol=1e-6, err_msg=name)  # float32


@pytest.mark.parametrize('file, has', [('steps', 'labels of `steps`'), ('pairs', 'pairs')])
def test_a_weight_needs_both_forms(small, run, inputs, tmp_path, file, has):
  values = {'data.path': str(tmp_path / f'{file}.jsonl'), 'reward.steps_weight': 0.5}
  with pytest.raises(UserError, match=rf'steps_weight=0\.5 .* and {file}\.jsonl has {has} alone'):
    run(small('reward', **inputs | values))


def test_the_check_of_a_run_reads_on_for_rows_of_the_other_form(
  small, inputs, tmp_path, one_device
):
  """It reads the first rows of each file, of which none may be a pair."""
  path = tmp_path / 'late.jsonl'
  write_rows(path, count=70)
  values = inputs | {'data.path': str(path), 'reward.margin': 0.5, 'reward.steps_weight': 0.5}
  stages = pipeline.prepare(small('reward', **values), tmp_path, one_device)
  with pytest.raises(UserError, match=r'reward\.margin is for pairs'):
    input_check.check(stages)
  with path.open('a') as file:
    file.write((tmp_path / 'pairs.jsonl').read_text())
  assert input_check.check(stages) == []


def test_columns_of_labelled_steps(small, inputs, tmp_path, one_device):
  """Each row needs the columns of its form; a name that no row has is refused."""
  rows = write_rows(tmp_path / 'steps.jsonl')
  renamed = [{**row, 'process': row['steps'], 'steps': 'in words'} for row in rows]
  pairs = (tmp_path / 'pairs.jsonl').read_text()
  path = tmp_path / 'mixed.jsonl'
  path.write_text(pairs + ''.join(json.dumps(row) + '\n' for row in renamed))

  def check(path, name):
    values = inputs | {'data.path': str(path), 'data.columns.steps': name}
    return input_check.check(pipeline.prepare(small('reward', **values), tmp_path, one_device))

  assert check(path, 'process') == []
  message = r"data\.columns\.steps='proces'.* keys are prompt, response, steps, process"
  path.write_text(''.join(json.dumps(row) + '\n' for row in renamed))
  with pytest.raises(UserError, match=r'`steps` is .in words.'):  # the column of that name
    check(path, 'proces')
  renamed = [{key: row[key] for key in row if key != 'steps'} for row in renamed]
  for text in (pairs, ''):
    path.write_text(text + ''.join(json.dumps(row) + '\n' for row in renamed))
    with pytest.raises(UserError, match=message.replace('steps, process', 'process')) as error:
      check(path, 'proces')
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=r"columns\.steps='process' is for .* are prompt, chosen"):
    check(tmp_path / 'pairs.jsonl', 'process')


@pytest.mark.parametrize(
  'files, update, row',
  [
    # 28 pairs, of which 7 at least are held out: 2 updates of 8 pairs and 7 labelled responses.
    ('pairs.jsonl,steps.jsonl', '24 of 52 rows .* 8 pairs and 7 responses', '2 +2.94 k +5.89 k'),
    ('steps.jsonl', '24 of 24 rows .* an update has 8 responses', '2 +1.02 k +2.05 k'),
    ('pairs.jsonl', '', '2 +2.05 k +4.1 k'),
  ],
)
def test_a_dry_run_counts_labelled_rows(
  small, inputs, tmp_path, one_device, capsys, files, update, row
):
  path = ','.join(str(tmp_path / name) for name in files.split(','))
  values = {'data.path': path, 'data.max_length': 128, 'reward.max_steps': 0}
  settings = small('reward', **inputs | values)
  dry_run.run(settings, pipeline.prepare(settings, tmp_path / 'run', one_device))
  out = capsys.readouterr().out
  assert re.search(rf'^reward .* {row}', out, re.MULTILINE), out
  assert re.search(rf'^reward +{update}.* with labelled steps$', out, re.MULTILINE) or not update
  assert ('labelled steps' in out) == bool(update)


def test_rows_of_large_data_are_counted_at_equal_distances(inputs, tmp_path, monkeypatch):
  path, monkey = tmp_path / 'both.jsonl', monkeypatch.setattr
  monkey('segjax.run.labelled_rows._MAX_ROWS', 13)
  texts = [(tmp_path / f'{name}.jsonl').read_text() for name in ('pairs', 'steps')]
  path.write_text('{}\n'.join(texts))
  forms = count_forms(Data(path=str(path)))
  assert (forms.read, forms.rows) == (13, 53) and 5 <= forms.labelled <= 7
  assert 6 <= forms.pairs <= 8 and 24 <= forms.leading_rows(8) <= 33
  assert '13 rows, at equal distances in 53, have' in forms.describe(8)
  path.write_text(texts[0])  # another content of the same file
  assert count_forms(Data(path=str(path))) == (13, 0, 13, 28)
  assert count_forms(Data(path='owner/name')) is count_forms(Data(path=str(tmp_path))) is None


def test_rows_of_neither_form(small, run, inputs, tmp_path):
  (tmp_path / 'none.jsonl').write_text(json.dumps({'prompt': 'a', 'response': 'b'}) + '\n')
  with pytest.raises(
    UserError, match=r'none\.jsonl, row 1: no `chosen` and `rejected` of a pair, and no'
  ):
    run(small('reward', **inputs | {'data.path': str(tmp_path / 'none.jsonl')}))


@pytest.mark.parametrize(
  'values, message',
  [
    ({'reward.margin': 0.5}, r'config\.reward\.margin is for pairs, and .*steps\.jsonl has labels'),
    ({'reward.entropy_cache_dir': 'run'}, 'entropy_cache_dir is for pairs'),
    ({'reward.threshold_search.entropy_quantile': 0.9, 'reward.segmentation.boundary': 'entropy'},
     'threshold_search is for pairs'),
  ],
)  # fmt: skip
def test_settings_of_pairs_are_refused(small, run, inputs, values, message):
  with pytest.raises(UserError, match=message):
    run(small('reward', **inputs | values))


def test_a_row_without_labels_among_others(small, run, inputs, tmp_path):
  with (tmp_path / 'steps.jsonl').open('a') as file:
    file.write(json.dumps({'prompt': 'x', 'response': 'the bear'}) + '\n')
  with pytest.raises(UserError, match=r'steps\.jsonl, row 25: `steps` is None; write a list'):
    run(small('reward', **inputs))
