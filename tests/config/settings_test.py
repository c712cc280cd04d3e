"""Defaults, presets and replacement of keys."""

import dataclasses
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from segjax.config import parse, presets, settings
from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import (
  Optimizer,
  RewardShaping,
  Segmentation,
  SegmentationOverrides,
  Settings,
)


def test_default_config_holds_every_default():
  config = presets.default_config()
  assert config.ppo.kl_coef == Settings().ppo.kl_coef
  assert config.reward.optimizer.learning_rate == 1e-6
  config.lock()
  with pytest.raises(AttributeError, match='kl_coeff'):
    config.ppo.kl_coeff = 0.1


@pytest.mark.parametrize(
  'preset, expected',
  [
    ('local', ('local', '', '')),
    ('demo,token', ('demo', 'token', '')),
    ('demo,v5p:2x2x2', ('demo', '', 'v5p:2x2x2')),
    ('demo,v5p:2x2x2,token', ('demo', 'token', 'v5p:2x2x2')),
  ],
)
def test_preset_is_name_granularity_and_topology(preset, expected):
  assert presets.parse_preset(preset, ('demo', 'local'), ('v5p:2x2x2',)) == expected


@pytest.mark.parametrize(
  'preset, message',
  [
    ('demmo', "'demmo' is not one of demo, local"),
    ('demo,v5p:2x2x2', "'v5p:2x2x2' is not one of segment, token, bandit"),
    ('demo,word', "'word' is not one of segment, token, bandit"),
    ('', "'' is not one of demo, local"),
  ],
)
def test_unknown_preset_is_named(preset, message):
  with pytest.raises(ValueError, match=message):
    presets.parse_preset(preset, ('demo', 'local'))


def test_replace_reaches_into_sections():
  changed = settings.replace(Settings(), seed=3, **{'data.path': 'x', 'sft.batch_size': 2})
  assert (changed.seed, changed.data.path, changed.sft.batch_size) == (3, 'x', 2)
  assert changed.sft.optimizer == Optimizer(learning_rate=2e-5)
  deeper = settings.replace(changed, **{'sft.optimizer.beta1': 0.8})
  assert deeper.sft == settings.replace(changed.sft, **{'optimizer.beta1': 0.8})
  assert (deeper.sft.optimizer.beta1, deeper.sft.batch_size) == (0.8, 2)
  assert Settings().data.path == ''


def test_overrides_have_the_fields_of_a_segmentation():
  fields = [[f.name for f in dataclasses.fields(c)] for c in (Segmentation, SegmentationOverrides)]
  assert fields[0] == fields[1]


@pytest.mark.parametrize(
  'key, text, value',
  [
    ('min_segment_length', '3', 3),
    ('entropy_threshold', '1.5', 1.5),
    ('entropy_threshold', '0', 0.0),
    ('include_eos', 'True', True),
    ('include_eos', 'false', False),
    ('granularity', 'token', 'token'),
  ],
)
def test_optional_settings_are_set_on_the_command_line(monkeypatch, key, text, value):
  arguments = ['segjax', f'--config.reward_model.segmentation.{key}={text}']
  monkeypatch.setattr(sys, 'argv', arguments)  # read where the flag is defined
  flag_values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', presets.default_config(), flag_values=flag_values)
  flag_values(arguments)
  config = flag_values.config
  config.stages = ('ppo',)
  overrides = parse.from_config(config).reward_model.segmentation
  assert overrides == SegmentationOverrides(**{key: value})


@pytest.mark.parametrize('ratio, floor', [(0.01, 0.01), (0.0, None)])
def test_std_floor_ratio_of_zero_is_no_floor(ratio, floor):
  assert resolve_std_floor_ratio(RewardShaping(std_floor_ratio=ratio)) == floor
