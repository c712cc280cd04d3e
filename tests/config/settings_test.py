"""Defaults, presets and replacement of keys."""

import pytest

from segjax.config import presets, settings
from segjax.config.settings import Optimizer, Settings


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
