"""segment_reward.json: writing, reading, overriding by the config, missing fields."""

import dataclasses
import json
import math

import pytest

from segjax.config.settings import RewardModelSettings, Segmentation, SegmentationOverrides
from segjax.data import demo_rows
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.errors import UserError
from segjax.rl.normalizer import PUBLISHED
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.types import Normalizer

SHA256 = 'ab' * 32
FITTED = Normalizer(w_mean=0.1, w_std=-0.2, b_mean=0.3, b_std=0.4)


def reward_model(normalizer='', **segmentation):
  """Returns config.reward_model with these fields set."""
  return RewardModelSettings('', SegmentationOverrides(**segmentation), normalizer)


@pytest.fixture
def model(tmp_path):
  """A model's directory with a tokenizer; weights are not read here."""
  demo_rows.write_tokenizer(tmp_path / 'model')
  return tmp_path / 'model'


def test_version_2_is_still_read(model):
  """Each field is read under its name in version 2."""
  (model / 'segment_reward.json').write_text(
    json.dumps(
      {
        'version': 2,
        'granularity': 'segment',
        'cut': 'delimiter',
        'entropy_threshold': 1.5,
        'fixed_length': 7,
        'delimiters': ';',
        'min_length': 3,
        'stop_token': 'inside',
        'aggregation': 'softmax',
        'temperature': 0.5,
        'normalizer': {'kind': 'global', 'w_mean': 0.0, 'w_std': 0.0, 'b_mean': 0.25, 'b_std': 2.0},
        'tokenizer_sha256': SHA256,
      }
    )
  )
  spec = reward_spec.read_spec(model)
  assert spec.segmentation == Segmentation(
    'segment', 'delimiter', 1.5, 7, ';', 3, True, 'softmax', 0.5
  )
  assert (spec.normalizer_kind, spec.normalizer.b_std) == ('global', 2)
  assert spec.tokenizer_sha256 == SHA256


def test_file_has_the_documented_form(model):
  reward_spec.write_spec(
    model,
    RewardSpec(
      Segmentation(entropy_threshold=1.5, min_segment_length=3),
      FITTED,
      'regression',
      tokenizer_sha256=SHA256,
    ),
  )
  assert json.loads((model / 'segment_reward.json').read_text()) == {
    'version': 4,
    'granularity': 'segment',
    'boundary': 'entropy',
    'entropy_threshold': 1.5,
    'segment_length': 16,
    'delimiters': '.!?\n',
    'min_segment_length': 3,
    'include_eos': False,
    'aggregation': 'mean',
    'softmax_temperature': 1.0,
    'boundary_fn': '',
    'probability_threshold': 0.9,
    'jump_threshold': 1.0,
    'shuffle_seed': 0,
    'normalizer': {
      'kind': 'regression',
      'w_mean': 0.1,
      'w_std': -0.2,
      'b_mean': 0.3,
      'b_std': 0.4,
    },
    'tokenizer_sha256': SHA256,
  }


def test_version_3_is_still_read(model):
  written = RewardSpec(Segmentation(entropy_threshold=1.5), None, tokenizer_sha256=SHA256)
  reward_spec.write_spec(model, written)
  file = model / 'segment_reward.json'
  record = json.loads(file.read_text()) | {'version': 3}
  for name in ('boundary_fn', 'probability_threshold', 'jump_threshold', 'shuffle_seed'):
    del record[name]
  file.write_text(json.dumps(record))
  assert reward_spec.read_spec(model) == written


@pytest.mark.parametrize('normalizer, kind', [(FITTED, 'scalar'), (None, '')])
def test_reads_what_was_written(model, normalizer, kind):
  written = RewardSpec(Segmentation('token'), normalizer, kind, tokenizer_sha256=SHA256)
  reward_spec.write_spec(model, written)
  assert reward_spec.read_spec(model) == written


def test_missing_file_is_none(model):
  assert reward_spec.read_spec(model) is None


@pytest.mark.parametrize(
  'text', ['{', '{"version": 1}', '{"version": 2}', '{"version": 2, "normalizer": {"kind": "x"}}']
)
def test_invalid_file_raises(model, text):
  (model / 'segment_reward.json').write_text(text)
  with pytest.raises(ValueError, match=r'model/segment_reward.json'):
    reward_spec.read_spec(model)


@pytest.mark.parametrize(
  'field, value, problem',
  [
    ('entropy_threshold', math.nan, 'must be finite'),
    ('entropy_threshold', True, 'must be of type float'),
    ('entropy_threshold', '1.5', 'must be of type float'),
    ('entropy_threshold', 10**400, 'too large'),
    ('entropy_threshold', 1e39, 'too large for float32'),
    ('granularity', 'segmant', "is not one of .* did you mean 'segment'"),
    ('granularity', None, 'must be of type str'),
    ('boundary', 'entrophy', "did you mean 'entropy'"),
    ('aggregation', 'median', 'is not one of'),
    ('segment_length', 1.5, 'must be of type int'),
    ('segment_length', True, 'must be of type int'),
    ('segment_length', 0, 'must be at least 1'),
    ('min_segment_length', -1, 'must be at least 1'),
    ('delimiters', ['.'], 'must be of type str'),
    ('boundary_fn', None, 'must be of type str'),
    ('probability_threshold', 0, 'must be above 0'),
    ('jump_threshold', -1.0, 'must be at least 0'),
    ('shuffle_seed', -1, 'must be at least 0'),
    ('include_eos', 1, 'must be of type bool'),
    ('include_eos', 'no', 'must be of type bool'),
    ('softmax_temperature', 0, 'must be above 0'),
    ('softmax_temperature', math.inf, 'must be finite'),
    ('tokenizer_sha256', 'abc', 'is not a SHA-256'),
    ('tokenizer_sha256', None, 'must be of type str'),
    ('version', 5, 'is not 4'),
    ('version', True, 'is not 4'),
    ('normalizer', 1.0, 'is neither null nor an object'),
    ('normalizer.kind', 'regresion', "did you mean 'regression'"),
    ('normalizer.kind', 3, 'must be of type str'),
    ('normalizer.w_mean', math.nan, 'must be finite'),
    ('normalizer.b_mean', 'x', 'must be of type float'),
    ('normalizer.w_std', True, 'must be of type float'),
    ('normalizer.b_std', 0, 'must be above 0'),
    ('normalizer.b_std', -1, 'must be above 0'),
    ('normalizer.b_std', 1e-50, 'must be above 0'),
    ('normalizer.b_std', math.inf, 'must be finite'),
  ],
)
def test_a_wrong_value_names_file_and_field(model, field, value, problem):
  file = _written(model)
  record = json.loads(file.read_text())
  section, _, name = field.rpartition('.')
  (record[section] if section else record)[name] = value
  file.write_text(json.dumps(record))
  with pytest.raises(UserError, match=f'model/segment_reward.json: {field}=?.*{problem}') as error:
    reward_spec.read_spec(model)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('section', ['', 'normalizer'])
def test_a_misspelled_or_missing_field_is_named(model, section):
  file = _written(model)
  record = json.loads(file.read_text())
  fields = record[section] if section else record
  name = 'b_std' if section else 'entropy_threshold'
  value = fields.pop(name)
  file.write_text(json.dumps(record))
  with pytest.raises(UserError, match=f"the field '{name}' is missing"):
    reward_spec.read_spec(model)
  fields[f'{name}s'] = value
  file.write_text(json.dumps(record))
  with pytest.raises(UserError, match=f"'{name}s' does not exist; did you mean '{name}'"):
    reward_spec.read_spec(model)


def test_a_file_nested_too_deep_is_one_line(model):
  (model / 'segment_reward.json').write_text('[' * 100_000)
  with pytest.raises(UserError, match='too deep'):
    reward_spec.read_spec(model)


def test_settings_of_the_file_that_conflict(model):
  reward_spec.write_spec(model, RewardSpec(Segmentation('bandit'), FITTED, 'regression'))
  with pytest.raises(UserError, match=r'segment_reward.json: normalizer.kind regression depends'):
    reward_spec.read_spec(model)
  reward_spec.write_spec(model, RewardSpec(Segmentation('token', 'delimiter'), None))
  with pytest.raises(UserError, match=r'segment_reward.json: boundary=delimiter has no effect'):
    reward_spec.read_spec(model)


@pytest.mark.parametrize(
  'fields, warning',
  [
    ({'entropy_threshold': 2.0}, ''),
    ({'entropy_threshold': 0.0}, 'cuts at every token'),
    ({'entropy_threshold': -3.0}, 'cuts at every token'),
    ({'entropy_threshold': 4.6}, ''),
    ({'entropy_threshold': 4.61}, 'cuts nowhere: the entropy over 100 tokens is at most 4.61'),
    ({'entropy_threshold': 9.0, 'granularity': 'token'}, ''),
    ({'entropy_threshold': 9.0, 'boundary': 'fixed_length'}, ''),
    ({'boundary': 'delimiter', 'delimiters': ''}, 'delimiters is empty'),
  ],
)
def test_boundaries_that_cut_nowhere_or_everywhere(fields, warning):
  segmentation = Segmentation(**fields)
  described = reward_spec.describe_extreme_boundaries(segmentation, 100)
  assert warning in described and bool(warning) == bool(described)


def _written(model):
  """Writes a valid file and returns its path."""
  reward_spec.write_spec(model, RewardSpec(Segmentation(), FITTED, 'regression', SHA256))
  return model / 'segment_reward.json'


def test_config_overrides_stored_fields(model):
  stored = Segmentation(entropy_threshold=1.5, aggregation='last', min_segment_length=2)
  reward_spec.write_spec(model, RewardSpec(stored, FITTED, 'regression'))
  assert reward_spec.resolve_spec(RewardModelSettings(), model, model) == RewardSpec(
    stored, FITTED, 'regression'
  )
  overrides = RewardModelSettings(
    segmentation=SegmentationOverrides(granularity='token', entropy_threshold=0.0),
    normalizer='published:llama3_8b_sft/token',
  )
  spec = reward_spec.resolve_spec(overrides, model, model)
  assert spec.segmentation == dataclasses.replace(
    stored, granularity='token', entropy_threshold=0.0
  )
  assert spec.normalizer == PUBLISHED['llama3_8b_sft/token']
  none = reward_spec.resolve_spec(RewardModelSettings(normalizer='none'), model, model)
  assert (none.normalizer, none.normalizer_kind) == (Normalizer(), 'none')


@pytest.mark.parametrize(
  'fields, missing',
  [
    ({}, ['granularity', 'entropy_threshold', 'normalizer']),
    ({'granularity': 'segment'}, ['entropy_threshold', 'normalizer']),
    ({'granularity': 'segment', 'boundary': 'fixed_length'}, ['normalizer']),
    ({'granularity': 'token'}, ['normalizer']),
    ({'granularity': 'bandit', 'entropy_threshold': 1.0}, ['normalizer']),
    ({'entropy_threshold': 1.0, 'normalizer': 'none'}, ['granularity']),
  ],
)
def test_without_a_file_all_fields_must_be_set(model, fields, missing):
  with pytest.raises(ValueError, match='run the normalizer job') as error:
    reward_spec.resolve_spec(reward_model(**fields), model, model)
  for key in ('segmentation.granularity', 'segmentation.entropy_threshold', 'normalizer'):
    is_named = f'config.reward_model.{key}' in str(error.value)
    assert is_named == (key.removeprefix('segmentation.') in missing)


def test_token_granularity_needs_no_threshold(model):
  settings = reward_model(granularity='token', normalizer='none')
  assert reward_spec.resolve_spec(settings, model, model).segmentation.granularity == 'token'


def test_unfitted_normaliser_raises(model):
  reward_spec.write_spec(model, RewardSpec(Segmentation(), None))
  with pytest.raises(ValueError, match='normalizer'):
    reward_spec.resolve_spec(RewardModelSettings(), model, model)


def test_stored_fingerprint_replaces_the_files(model):
  reward_spec.check_tokenizer(model, model)
  reward_spec.check_tokenizer(model, model, tokenizer_fingerprint(str(model)))
  with pytest.raises(ValueError, match='differ'):
    reward_spec.check_tokenizer(model, model, 'another')
