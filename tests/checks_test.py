"""Every preset is consistent, and every wrong value is answered by a line that names its key."""

import importlib

import pytest

from segjax import checks, settings

PRESETS = [
  ('ppo', 'demo'),
  ('ppo', 'demo_long'),
  ('ppo', 'demo,token'),
  ('ppo', 'local,bandit'),
  ('ppo', 'llama3_8b_sft'),
  ('ppo', 'llama3_8b_sft,token'),
  ('ppo', 'llama3_8b_sft,bandit'),
  ('sft', 'demo'),
  ('sft', 'local'),
  ('reward', 'demo,bandit'),
  ('reward', 'local,token'),
  ('reward', 'llama3_8b_sft'),
  ('normalizer', 'demo'),
  ('normalizer', 'local'),
  ('evaluate', 'demo'),
  ('evaluate', 'local'),
]


def _config(**values):
  config = settings.default_config()
  config.stages = ('ppo',)
  config.update_from_flattened_dict(values)
  return config


@pytest.mark.parametrize('file, preset', PRESETS, ids=['-'.join(pair) for pair in PRESETS])
def test_presets_are_consistent(file, preset):
  resolved = checks.from_config(importlib.import_module(f'configs.{file}').get_config(preset))
  granularity = preset.partition(',')[2]
  if granularity:
    assert granularity in (resolved.reward.granularity, resolved.reward_model.granularity)
  if preset == 'local':
    assert resolved.stages == (file,)


@pytest.mark.parametrize('granularity', ['segment', 'token', 'bandit'])
def test_published_recipe(granularity):
  """Method notes, section 5.8: what differs by granularity, and what does not."""
  config = importlib.import_module('configs.ppo').get_config(f'llama3_8b_sft,{granularity}')
  s = checks.from_config(config)
  assert s.ppo.value_clip_eps == {'segment': 0.25, 'token': 0.25, 'bandit': 0.2}[granularity]
  assert s.ppo.length_norm == (granularity == 'token')
  assert s.reward_model.normalizer == f'published:llama3_8b_sft/{granularity}'
  assert checks.spread(s, granularity) == ('bandit' if granularity == 'bandit' else 'even_split')
  assert (s.ppo.steps, s.ppo.rollout_batch, s.ppo.minibatch, s.ppo.epochs) == (59, 1024, 128, 1)
  assert (s.ppo.policy_optimizer.learning_rate, s.ppo.critic_optimizer.learning_rate) == (
    5e-7,
    9e-6,
  )


@pytest.mark.parametrize(
  'key, message',
  [
    ('ppo.kl_coeff', r'config.ppo.kl_coeff does not exist; did you mean config.ppo.kl_coef\?'),
    ('ppoo.kl_coef', 'did you mean config.ppo.kl_coef'),
    ('learning_rate', 'config.sft.optimizer.learning_rate'),
    ('reward.optimizer.learningrate', 'did you mean config.reward.optimizer.learning_rate'),
    ('zzz', r'config.zzz does not exist\.'),
  ],
)
def test_unknown_key_names_the_nearest(key, message):
  with pytest.raises(ValueError, match=message):
    checks.check_key(key)


def test_known_keys_and_sections_pass():
  for key in ('seed', 'ppo', 'ppo.policy_optimizer', 'ppo.policy_optimizer.learning_rate'):
    checks.check_key(key)


def test_key_that_a_config_file_made_up():
  config = settings.default_config()
  config.ppo.lamda = 1.0
  with pytest.raises(ValueError, match=r'config.ppo.lamda does not exist'):
    checks.from_config(config)


@pytest.mark.parametrize('given', [('sft,reward',), ('sft', 'reward'), ('sft, reward',)])
def test_stages_may_be_joined_by_commas(given):
  assert checks.from_config(_config(stages=given)).stages == ('sft', 'reward')


def test_whole_numbers_become_floats():
  config = settings.default_config().to_dict()
  config['stages'], config['ppo']['kl_coef'] = ('ppo',), 1
  from ml_collections import ConfigDict

  assert isinstance(checks.from_config(ConfigDict(config)).ppo.kl_coef, float)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'stages': ()}, 'config.stages is empty; name jobs out of demo, sft'),
    ({'stages': ('ppp',)}, "config.stages='ppp' is not one of .*; did you mean 'ppo'"),
    ({'stages': ('ppo', 'sft')}, 'must be in order: sft,ppo'),
    ({'stages': ('sft', 'sft')}, 'must be in order: sft'),
    ({'stages': ('reward',), 'reward_model.path': 'x'}, 'config.stages trains a reward model'),
    ({'runtime.dtype': 'bf16'}, "runtime.dtype='bf16' is not one of float32, bfloat16"),
    ({'runtime.attention': 'cudnn'}, 'needs config.runtime.dtype=bfloat16'),
    ({'data.overlong': 'truncate'}, "did you mean 'truncate_left'"),
    ({'reward.granularity': 'word'}, 'config.reward.granularity'),
    ({'reward_model.normalizer': 'publshed:x'}, 'config.reward_model.normalizer'),
    (
      {'reward_model.normalizer': 'published:llama3_8b_sft/segmnt'},
      "did you mean 'published:llama3_8b_sft/segment'",
    ),
    ({'normalizer.kind': 'linear'}, 'is not one of auto, none, scalar, regression'),
    ({'ppo.spread': 'even'}, 'config.ppo.spread'),
    ({'ppo.kl_estimator': 'k4'}, 'is not one of k1, k2, k3'),
    ({'data.max_prompt_length': 2048}, 'leaves no room for a response'),
    ({'rollout.min_new_tokens': 2000}, 'is more than config.rollout.max_new_tokens=1024'),
    ({'rollout.top_p': 0.0}, 'config.rollout.top_p=0.0'),
    ({'reward.holdout': 0.0}, 'must lie between 0 and 1'),
    ({'ppo.steps': 0}, 'config.ppo.steps=0 must be at least 1'),
    ({'data.limit': -1}, 'config.data.limit=-1 must be at least 0'),
    ({'ppo.policy_optimizer.learning_rate': -1.0}, 'policy_optimizer.learning_rate=-1.0 is neg'),
    ({'sft.optimizer.learning_rate': float('inf')}, 'learning_rate=inf must be finite'),
    ({'sft.optimizer.warmup_ratio': 3.0}, 'warmup_ratio=3.0'),
    ({'demo.min_clauses': 9}, 'must be from 1 to config.demo.max_clauses=5'),
    ({'ppo.minibatch': 100}, 'use ppo.minibatch=64 or rollout_batch=1100'),
    ({'ppo.score_batch': 3}, 'not divisible by config.ppo.score_batch=3'),
    ({'rollout.batch': 5}, 'not divisible by config.rollout.batch=5'),
  ],
)
def test_wrong_values_name_their_key(values, message):
  with pytest.raises(ValueError, match=message):
    checks.from_config(_config(**values))


@pytest.mark.parametrize(
  'section, key, value, message',
  [
    ('ppo', 'steps', True, 'config.ppo.steps=True must be of type int'),
    ('ppo', 'steps', '3', "config.ppo.steps='3' must be of type int"),
    ('ppo', 'length_norm', 1, 'must be of type bool'),
    ('data', 'path', None, 'config.data.path=None must be of type str'),
    ('ppo', 'policy_optimizer', 1e-3, 'must be a section with keys of its own'),
  ],
)
def test_wrong_types_name_their_key(section, key, value, message):
  from ml_collections import ConfigDict

  config = settings.default_config().to_dict()
  config['stages'], config[section][key] = ('ppo',), value
  with pytest.raises(ValueError, match=message):
    checks.from_config(ConfigDict(config))
