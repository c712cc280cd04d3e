"""segment_reward.json: writing, reading, overriding by the config, missing fields."""

import dataclasses
import json

import pytest

from segjax.config.settings import RewardModelSettings, Segmentation, SegmentationOverrides
from segjax.data import demo_rows
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.rl.normalizer import PUBLISHED
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.types import Normalizer

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
        'tokenizer_sha256': 'abc',
      }
    )
  )
  spec = reward_spec.read_spec(model)
  assert spec.segmentation == Segmentation(
    'segment', 'delimiter', 1.5, 7, ';', 3, True, 'softmax', 0.5
  )
  assert (spec.normalizer_kind, spec.normalizer.b_std) == ('global', 2)
  assert spec.tokenizer_sha256 == 'abc'


def test_file_has_the_documented_form(model):
  reward_spec.write_spec(
    model,
    RewardSpec(
      Segmentation(entropy_threshold=1.5, min_segment_length=3),
      FITTED,
      'regression',
      tokenizer_sha256='abc',
    ),
  )
  assert json.loads((model / 'segment_reward.json').read_text()) == {
    'version': 3,
    'granularity': 'segment',
    'boundary': 'entropy',
    'entropy_threshold': 1.5,
    'segment_length': 16,
    'delimiters': '.!?\n',
    'min_segment_length': 3,
    'include_eos': False,
    'aggregation': 'mean',
    'softmax_temperature': 1.0,
    'normalizer': {
      'kind': 'regression',
      'w_mean': 0.1,
      'w_std': -0.2,
      'b_mean': 0.3,
      'b_std': 0.4,
    },
    'tokenizer_sha256': 'abc',
  }


@pytest.mark.parametrize('normalizer, kind', [(FITTED, 'scalar'), (None, '')])
def test_reads_what_was_written(model, normalizer, kind):
  written = RewardSpec(Segmentation('token'), normalizer, kind, tokenizer_sha256='abc')
  reward_spec.write_spec(model, written)
  assert reward_spec.read_spec(model) == written


def test_missing_file_is_none(model):
  assert reward_spec.read_spec(model) is None


@pytest.mark.parametrize(
  'text', ['{', '{"version": 1}', '{"version": 2}', '{"version": 2, "normalizer": {"kind": "x"}}']
)
def test_invalid_file_raises(model, text):
  (model / 'segment_reward.json').write_text(text)
  with pytest.raises(ValueError, match=r'model/segment_reward.json: .* fit it again'):
    reward_spec.read_spec(model)


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
