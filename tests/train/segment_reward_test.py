"""segment_reward.json: what is written is read, what is missing must be named."""

import json

import pytest

from segjax.data import demo
from segjax.data.tokenizer import fingerprint
from segjax.rl.normalizer import PUBLISHED
from segjax.settings import RewardModel
from segjax.train import segment_reward
from segjax.train.segment_reward import SegmentReward
from segjax.types import Normalizer

FITTED = Normalizer(w_mean=0.1, w_std=-0.2, b_mean=0.3, b_std=0.4)


@pytest.fixture
def model(tmp_path):
  """A directory with a tokenizer, all that this module looks at."""
  demo.write_tokenizer(tmp_path / 'model')
  return tmp_path / 'model'


def test_file_has_the_documented_form(model):
  segment_reward.write(
    model, SegmentReward('segment', 1.5, FITTED, 'regression', tokenizer_sha256='abc')
  )
  assert json.loads((model / 'segment_reward.json').read_text()) == {
    'version': 1,
    'granularity': 'segment',
    'entropy_threshold': 1.5,
    'aggregation': 'mean',
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
def test_what_is_written_is_read(model, normalizer, kind):
  written = SegmentReward('token', 2.0, normalizer, kind, tokenizer_sha256='abc')
  segment_reward.write(model, written)
  assert segment_reward.read(model) == written


def test_no_file_is_no_error(model):
  assert segment_reward.read(model) is None


@pytest.mark.parametrize(
  'text', ['{', '{"version": 2}', '{"version": 1}', '{"version": 1, "normalizer": {"kind": "x"}}']
)
def test_broken_file_is_named(model, text):
  (model / 'segment_reward.json').write_text(text)
  with pytest.raises(ValueError, match=r'model/segment_reward.json: .* fit it again'):
    segment_reward.read(model)


def test_stored_meaning_is_used_and_each_field_may_be_overruled(model):
  segment_reward.write(model, SegmentReward('segment', 1.5, FITTED, 'regression'))
  assert segment_reward.resolve(RewardModel(), model, model) == SegmentReward(
    'segment', 1.5, FITTED, 'regression'
  )
  named = RewardModel(
    granularity='token', entropy_threshold=0.0, normalizer='published:llama3_8b_sft/token'
  )
  found = segment_reward.resolve(named, model, model)
  assert (found.granularity, found.entropy_threshold) == ('token', 0.0)
  assert found.normalizer == PUBLISHED['llama3_8b_sft/token']
  none = segment_reward.resolve(RewardModel(normalizer='none'), model, model)
  assert (none.normalizer, none.normalizer_kind) == (Normalizer(), 'none')


@pytest.mark.parametrize(
  'named, missing',
  [
    ({}, ['granularity', 'entropy_threshold', 'normalizer']),
    ({'granularity': 'segment'}, ['entropy_threshold', 'normalizer']),
    ({'granularity': 'token'}, ['normalizer']),
    ({'granularity': 'bandit', 'entropy_threshold': 1.0}, ['normalizer']),
    ({'entropy_threshold': 1.0, 'normalizer': 'none'}, ['granularity']),
  ],
)
def test_without_a_file_all_must_be_named(model, named, missing):
  with pytest.raises(ValueError, match='run the normalizer job') as error:
    segment_reward.resolve(RewardModel(**named), model, model)
  for key in ('granularity', 'entropy_threshold', 'normalizer'):
    assert (f'config.reward_model.{key}' in str(error.value)) == (key in missing)


def test_token_granularity_needs_no_threshold(model):
  found = segment_reward.resolve(RewardModel(granularity='token', normalizer='none'), model, model)
  assert found.granularity == 'token'


def test_unfitted_normaliser_is_refused(model):
  segment_reward.write(model, SegmentReward('segment', 1.5, None))
  with pytest.raises(ValueError, match='normalizer'):
    segment_reward.resolve(RewardModel(), model, model)


def test_fingerprint_decides_where_there_is_one(model):
  segment_reward.check_tokenizer(model, model)
  segment_reward.check_tokenizer(model, model, fingerprint(str(model)))
  with pytest.raises(ValueError, match='differ'):
    segment_reward.check_tokenizer(model, model, 'another')
