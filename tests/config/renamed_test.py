"""An old name of a flag, key or metric is a one-line error with the new name."""

import pytest

from segjax.config import command_line, parse, presets, renamed
from segjax.errors import UserError


def _message(function, *arguments):
  with pytest.raises(UserError) as error:
    function(*arguments)
  return str(error.value)


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--mirror=x', '--mirror is now --local_copy'),
    ('--processes=2', '--processes is now --num_processes'),
    ('--process=1', '--process is now --process_id'),
    ('--compilation_cache=', '--compilation_cache is now --compilation_cache_dir'),
    ('--profile_steps=5:7', '--profile_steps is now --config.profile_steps'),
    ('--config.ppo.minibatch=4', 'config.ppo.minibatch is now config.ppo.minibatch_size'),
    ('--config.max_bad_steps=4', 'config.max_bad_steps is now config.max_skipped_steps'),
    (
      '--config.shaping.end_penalty=off',
      'config.shaping.end_penalty is now config.reward_shaping.missing_eos_penalty',
    ),
    ('--config.shaping.spread=repeat', 'config.shaping.spread is now config.reward_shaping.spread'),
    (
      '--config.reward.calibration.batch=4',
      'config.reward.calibration.batch is now config.reward.threshold_search.batch_size',
    ),
  ],
)
def test_old_flags_and_keys(argument, message):
  assert _message(command_line.parse_flags, ['segjax', argument]) == message


def test_new_keys_exist_and_old_keys_do_not():
  keys = set(parse.setting_keys())
  for section, leaves in renamed._KEYS.items():
    prefix = f'{section}.' if section else ''
    for old, new in leaves.items():
      assert prefix + new in keys
      assert prefix + old not in keys
  for key in keys:
    renamed.check_key(key)


@pytest.mark.parametrize(
  'old, message',
  [
    ('val/loss', 'critic/loss'),
    ('bad', 'skipped_updates'),
    ('train/loss', 'sft/loss in SFT and reward_model/loss in reward training'),
    ('reward/z_by_position/3', 'reward/by_position/3'),
    ('eval/longer_wins', 'eval/length_baseline_accuracy'),
  ],
)
def test_old_metrics(old, message):
  config = presets.default_config()
  config.stages, config.checkpoint.best_metric = ('ppo',), old
  assert _message(parse.from_config, config) == (
    f'config.checkpoint.best_metric={old} is now {message}'
  )


def test_old_key_in_a_config_file():
  config = presets.default_config()
  config.ppo.minibatch = 4
  message = 'config.ppo.minibatch is now config.ppo.minibatch_size'
  assert _message(parse.from_config, config) == message
