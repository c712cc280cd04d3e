"""Settings that `reference_exact` switches on, and settings that it refuses."""

import dataclasses
import importlib

import pytest

from segjax.config import parse
from segjax.config.settings import Compat


def resolved(file='ppo', preset='llama3_8b_sft', **values):
  config = importlib.import_module(f'configs.{file}').get_config(preset)
  config.update_from_flattened_dict({'reference_exact': True} | values)
  return parse.from_config(config)


def test_every_switch_is_on_and_the_fixes_are_off():
  s = resolved()
  switches = {k: v for k, v in dataclasses.asdict(s.compat).items() if isinstance(v, bool)}
  assert all(switches.values()) and len(switches) == len(dataclasses.fields(Compat)) - 1
  assert s.compat.micro_batch_size == 4
  assert s.reward_shaping.std_floor_ratio == 0
  assert s.rollout.recompute_logprob and s.runtime.round_logits
  assert s.ppo.policy_optimizer.decayed_weights == 'matrices'
  assert (s.normalizer.weighting, s.normalizer.min_bin_count) == ('uniform', 1)


def test_all_is_off_by_default():
  assert not any(value is True for value in dataclasses.asdict(Compat()).values())


def test_bins_weigh_the_same_in_the_demo_too():
  config = importlib.import_module('configs.ppo').get_config('demo')
  assert parse.from_config(config).normalizer.weighting == 'count'
  config.reference_exact = True
  assert parse.from_config(config).normalizer.weighting == 'uniform'


@pytest.mark.parametrize('file', ['reward', 'ppo'])
def test_tokens_are_segments_of_threshold_zero(file):
  s = resolved(file, 'llama31_8b_instruct,token')
  section = s.reward if file == 'reward' else s.reward_model
  assert section.segmentation.granularity == 'segment'
  assert section.segmentation.entropy_threshold == 0


@pytest.mark.parametrize('granularity, threshold', [('segment', 2.0), ('bandit', 2.0)])
def test_segments_and_bandit_are_unchanged(granularity, threshold):
  segmentation = resolved(preset=f'llama3_8b_sft,{granularity}').reward_model.segmentation
  assert (segmentation.granularity, segmentation.entropy_threshold) == (granularity, threshold)


@pytest.mark.parametrize(
  'values, message',
  [
    (
      {'reward_shaping.missing_eos_penalty': 'at_eos'},
      r'missing_eos_penalty=.at_eos. .* \(off or per_token\)',
    ),
    ({'reward_shaping.length_penalty': 'linear'}, r'\(off or threshold\)'),
    ({'normalizer.min_bin_count': 2}, r'min_bin_count=2.*reference_exact=False'),
  ],
)
def test_settings_the_published_code_lacks_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    resolved(**values)
