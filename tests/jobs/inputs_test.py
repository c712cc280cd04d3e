"""Invalid input: one line that names file, row or key, before weights are loaded."""

import dataclasses
import gzip
import json
import shutil

import pytest
from fixtures import models, runs

from segjax.config.settings import Data, RolloutSettings, Segmentation
from segjax.errors import UserError
from segjax.hf import reader
from segjax.jobs import pipeline
from segjax.jobs.dry_run import run as dry_run
from segjax.run import inputs
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.types import Normalizer


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
  """Makes loading weights fail: every error here must come before."""

  def refuse(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(reader, 'load_params', refuse)


@pytest.fixture
def model(language, tmp_path):
  """A copy of the untrained model, which a test may change."""
  return shutil.copytree(language / 'model', tmp_path / 'policy')


def _rows(path, *rows):
  with gzip.open(path, 'wt') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  return str(path)


def _update_json(file, **values):
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize('path', ['a' * 300, '~no-such-user/x'])
@pytest.mark.parametrize('key', ['policy.path', 'data.path', 'critic.init', 'checkpoint.directory'])
def test_paths_that_cannot_be_looked_up(small, run, model, tmp_path, key, path):
  data = _rows(tmp_path / 'rows.jsonl.gz', {'prompt': 'a'})
  values = {'policy.path': str(model), 'data.path': data, 'reward_shaping.reward_model_weight': 0.0}
  with pytest.raises(UserError, match=rf'{key}=.* cannot be looked up'):
    run(small('ppo', **values | {key: path, 'reward_shaping.reward_fn': 'operator:eq'}))


@pytest.mark.parametrize('path', ['a' * 300, '~no-such-user/x'])
def test_the_directory_of_entropies_cannot_be_created(small, run, model, tmp_path, path):
  row = {'prompt': 'badger', 'chosen': 'clever.', 'rejected': 'dull.'}
  values = {'policy.path': str(model), 'data.path': _rows(tmp_path / 'r.jsonl.gz', *[row] * 4)}
  with pytest.raises(UserError, match=r'entropy_cache_dir=.* cannot be looked up'):
    run(small('reward', **values, **{'reward.entropy_cache_dir': path}))
  with pytest.raises(UserError, match='cannot be looked up'):
    reader.resolve_checkpoint(path)


GOOD = {'messages': [{'role': 'user', 'content': 'a'}], 'chosen': 'b', 'rejected': 'c'}


@pytest.mark.parametrize(
  'stage, rows, message',
  [
    ('sft', [], 'rows.jsonl.gz: no rows'),
    ('reward', [GOOD, {'chosen': 'x'}], 'rows.jsonl.gz, row 2: no prompt in .* keys are chosen'),
    ('reward', [GOOD, GOOD, {'prompt': 'x', 'chosen': 'y'}], 'row 3: no `rejected`'),
    ('reward', [{'prompt': 'x', 'rejected': 'y'}], 'row 1: no `chosen`'),
    ('sft', [{'body': 'x'}], 'row 1: no `messages` and no `chosen`.*its keys are body'),
    ('sft', [{'messages': 'x'}], 'row 1: `messages` must be a non-empty list'),
    ('sft', [{'messages': [{'role': 'user'}]}], 'row 1: message 1 of `messages` must be'),
  ],
)
def test_rows_that_cannot_be_read(small, run, model, tmp_path, stage, rows, message):
  data = _rows(tmp_path / 'rows.jsonl.gz', *rows)
  with pytest.raises(ValueError, match=message):
    run(small(stage, **{'policy.path': str(model), 'data.path': data}))


def test_overlong_row_with_policy_error(small, run, language):
  values = {
    'policy.path': str(language / 'model'),
    'data.path': str(language / 'rows' / 'pairs.jsonl.gz'),
    'data.overlong_policy': 'error',
    'data.max_length': 24,
    'data.max_prompt_length': 16,
  }
  for stage in ('sft', 'reward'):
    with pytest.raises(ValueError, match=r'pairs.jsonl.gz, row \d+: .* tokens exceed data.max'):
      run(small(stage, **values))


def test_batch_larger_than_the_data(small, run, language, tmp_path):
  data = _rows(tmp_path / 'rows.jsonl.gz', GOOD, GOOD)
  with pytest.raises(ValueError, match=r'config.sft.batch_size=8 is more than the 2 rows'):
    run(small('sft', **{'policy.path': str(language / 'model'), 'data.path': data}))


def test_directory_that_is_not_a_checkpoint(small, run, language, tmp_path):
  (tmp_path / 'empty').mkdir()
  values = {'policy.path': str(tmp_path / 'empty'), 'data.path': str(language / 'rows')}
  with pytest.raises(ValueError, match=r'empty.config.json does not exist; is .* an HF checkpoint'):
    run(small('sft', **values))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model_type': 'gpt2'}, "config.json: model_type is 'gpt2'; only llama, .* are read"),
    ({'quantization_config': {'quant_method': 'awq'}}, 'quantized weights are not read'),
    ({'hidden_size': None}, 'hidden_size is missing; it must be an integer from 1'),
  ],
)
def test_checkpoint_that_is_not_llama(small, run, model, language, changes, message):
  _update_json(model / 'config.json', **changes)
  values = {'policy.path': str(model), 'data.path': str(language / 'rows' / 'sft.jsonl.gz')}
  with pytest.raises(ValueError, match=message):
    run(small('sft', **values))


def test_tokenizer_without_a_chat_template(small, run, model, language):
  (model / 'chat_template.jinja').unlink(missing_ok=True)
  _update_json(model / 'tokenizer_config.json', chat_template=None)
  values = {'policy.path': str(model), 'data.path': str(language / 'rows' / 'sft.jsonl.gz')}
  with pytest.raises(
    ValueError, match=r'policy: the tokenizer has no chat template; set data.chat'
  ):
    run(small('sft', **values))


@pytest.fixture(scope='module')
def scalar(language, tmp_path_factory):
  """A reward model of the language's sizes and tokenizer."""
  directory = tmp_path_factory.mktemp('scalar') / 'model'
  return runs.reward_model(language / 'model', directory, None, Segmentation())


@pytest.fixture
def ppo_inputs(model, language, scalar, tmp_path):
  """Paths of a PPO run; its reward model is a copy that stores segmentation and normaliser."""
  reward = shutil.copytree(scalar, tmp_path / 'reward_model')
  reward_spec.write_spec(reward, RewardSpec(Segmentation(), Normalizer(), 'regression'))
  return {
    'policy.path': str(model),
    'reward_model.path': str(reward),
    'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
  }


def test_valid_inputs_reach_the_loading_of_weights(small, run, ppo_inputs):
  with pytest.raises(AssertionError, match='weights were loaded'):
    run(small('ppo', **ppo_inputs))


def test_reward_model_without_a_normaliser(small, run, ppo_inputs, tmp_path):
  reward_spec.write_spec(tmp_path / 'reward_model', RewardSpec(Segmentation(), None))
  with pytest.raises(ValueError, match=r'run the normalizer job on it, or set config.reward_m'):
    run(small('ppo', **ppo_inputs))
  with pytest.raises(AssertionError, match='weights were loaded'):
    run(small('ppo', **ppo_inputs, **{'reward_model.normalizer': 'none'}))


@pytest.mark.parametrize('changed', ['policy', 'reward_model'])
@pytest.mark.parametrize('has_fingerprint', [True, False])
def test_tokenizers_that_differ(small, run, ppo_inputs, tmp_path, changed, has_fingerprint):
  if has_fingerprint:
    from segjax.data.tokenizer_files import tokenizer_fingerprint

    sha = tokenizer_fingerprint(str(tmp_path / 'reward_model'))
    spec = RewardSpec(Segmentation(), Normalizer(), 'none', tokenizer_sha256=sha)
    reward_spec.write_spec(tmp_path / 'reward_model', spec)
    changed = 'policy'
  tokenizer = tmp_path / changed / 'tokenizer.json'
  content = json.loads(tokenizer.read_text())
  content['model']['vocab']['zebra'] = content['model']['vocab'].pop('user')
  tokenizer.write_text(json.dumps(content))
  with pytest.raises(AssertionError, match='weights were loaded'):  # the reward model reads text
    run(small('ppo', **ppo_inputs))
  with pytest.raises(ValueError, match=r'the tokenizers of .* and .* differ; segments'):
    run(small('ppo', **ppo_inputs, **{'reward_model.reads': 'tokens'}))


def test_reference_with_another_tokenizer(small, run, ppo_inputs, tmp_path):
  other = shutil.copytree(tmp_path / 'policy', tmp_path / 'other')
  content = json.loads((other / 'tokenizer.json').read_text())
  content['model']['vocab']['zebra'] = content['model']['vocab'].pop('user')
  (other / 'tokenizer.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r'the tokenizers of .*other and .*policy differ'):
    run(small('ppo', **ppo_inputs, **{'reference.path': str(other)}))


def test_responses_longer_than_the_context_are_shortened():
  networks = {
    name: dataclasses.replace(models.CONFIG, max_position_embeddings=positions)
    for name, positions in (('policy', 256), ('critic', 128))
  }
  for max_new_tokens, expected in ((127, 127), (128, 64), (1024, 64)):
    lines = []
    rollout = RolloutSettings(max_new_tokens=max_new_tokens)
    fitted = inputs.fit_rollout(rollout, networks, lines.append)
    assert fitted.max_new_tokens == expected
    assert lines == (
      []
      if max_new_tokens < 128
      else [
        'responses have at most 64 tokens, half of the 128 positions of the critic '
        f'(config.rollout.max_new_tokens={max_new_tokens})'
      ]
    )
    limits = inputs.prompt_limits(Data(), networks, expected, lambda _: None)
    assert limits.max_prompt_length == 128 - expected


def test_normalizer_job_checks_that_the_model_is_writable(small, run, ppo_inputs, monkeypatch):
  monkeypatch.setattr('os.access', lambda *_: False)
  values = ppo_inputs | {'reference.path': ppo_inputs['policy.path']}
  with pytest.raises(ValueError, match='cannot be written to'):
    run(small('normalizer', **values))


def test_dry_run_loads_no_weights(small, one_device, ppo_inputs, tmp_path, capsys):
  values = small('ppo', 'evaluate', **ppo_inputs)
  dry_run(values, pipeline.prepare(values, tmp_path, one_device))
  out = capsys.readouterr().out
  assert '4 x ' in out and '320' in out  # 8 responses of 32 + 8 tokens
  assert 'no weights were loaded' in out


def test_checkpoint_directory_that_cannot_be_created(small, run, language, tmp_path):
  (tmp_path / 'file').write_text('')
  paths = {'policy.path': str(language / 'model'), 'data.path': str(language / 'rows')}
  overrides = {'checkpoint.directory': f'{tmp_path}/file/x'}
  with pytest.raises(
    ValueError, match=r'config.checkpoint.directory=.*file/x cannot be created: .*file is not a dir'
  ):
    run(small('sft', **paths, **overrides))


@pytest.mark.parametrize('stage', ['ppo', 'evaluate', 'normalizer', 'evaluate_reward'])
def test_a_language_model_is_not_a_reward_model(small, run, language, model, stage):
  """Its scores would be those of a head drawn at random."""
  pairs = str(language / 'rows' / 'pairs.jsonl.gz')
  segmentation = dataclasses.asdict(Segmentation(granularity='token'))
  values = {
    'policy.path': str(language / 'model'),
    'reference.path': str(language / 'model'),
    'reward_model.path': str(model),
    'reward_model.normalizer': '' if stage == 'normalizer' else 'none',
    'data.path': pairs,
    'evaluate_reward.pairs': pairs,
    **{f'reward_model.segmentation.{name}': value for name, value in segmentation.items()},
  }
  with pytest.raises(ValueError, match='has no scalar head, so it is not a reward model'):
    run(small(stage, **values))


@pytest.fixture
def beyond(ppo_inputs, tmp_path):
  """A function that adds a token without an embedding to the models, in the template or not."""

  def change(in_template):
    for name in ('policy', 'reward_model'):
      file = tmp_path / name / 'tokenizer.json'
      content = json.loads(file.read_text())
      token = dict(content['added_tokens'][0], content='<|new|>', id=_num_rows(tmp_path / name))
      content['added_tokens'].append(token)
      file.write_text(json.dumps(content))
      config = tmp_path / name / 'tokenizer_config.json'
      values = {'pad_token': '<|new|>'}
      if in_template:
        template = tmp_path / name / 'chat_template.jinja'
        template.write_text('{{ "<|new|>" }}' + template.read_text())
      _update_json(config, **values)

  return change


def _num_rows(directory):
  return json.loads((directory / 'config.json').read_text())['vocab_size']


@pytest.mark.parametrize(
  'stage', ['sft', 'reward', 'normalizer', 'ppo', 'evaluate', 'evaluate_reward', 'answers', 'chat']
)
def test_ids_beyond_the_embedding(small, run, ppo_inputs, beyond, language, tmp_path, stage):
  """The lookup returned the last row, and all but generation went on."""
  kind = 'prompts' if stage in ('ppo', 'evaluate') else 'pairs'
  rows = language / 'rows' / f'{kind}.jsonl.gz'
  values = {'policy.path': str(tmp_path / 'policy'), 'data.path': str(rows)}
  if stage == 'answers':
    question = {'question_id': 1, 'category': 'x', 'turns': ['hello']}
    (tmp_path / 'question.jsonl').write_text(json.dumps(question) + '\n')
    values['data.path'] = str(tmp_path / 'question.jsonl')
  if stage not in ('sft', 'reward', 'answers'):
    values['reward_model.path'] = ppo_inputs['reward_model.path']
  if stage in ('normalizer', 'evaluate_reward'):
    values['reference.path'] = values.pop('policy.path')
  if stage == 'evaluate':
    values['reference.path'] = values['policy.path']
  beyond(in_template=False)  # a pad token
  with pytest.raises(AssertionError, match='weights were loaded'):
    run(small(stage, **values))
  beyond(in_template=True)
  with pytest.raises(ValueError, match=r"'<\|new\|>' as id \d+, but the embedding of the .* has"):
    run(small(stage, **values))
