"""Config files: the user's own, and the shipped ones from any directory."""

import pytest

from segjax.config import config_files
from segjax.errors import UserError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A working directory that is not the repository."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_every_shipped_config_is_described():
  configs = config_files.shipped_configs()
  assert {'sft', 'reward', 'ppo', 'chat'} <= {config.name for config in configs}
  for config in configs:
    assert config.docstring.splitlines()[0].endswith('.')
    assert f'configs/{config.name}.py' in config.docstring


def test_shipped_configs_are_found_from_any_directory(elsewhere):
  path = config_files.resolve('configs/ppo.py:local')
  assert path == f'{config_files.shipped_root()}/configs/ppo.py:local'
  assert config_files.short_name(path) == 'configs/ppo.py:local'


def test_a_file_of_the_user_comes_first(elsewhere):
  own = elsewhere / 'configs' / 'ppo.py'
  own.parent.mkdir()
  own.write_text('def get_config(preset="x"):\n  pass\n')
  assert config_files.resolve('configs/ppo.py:local') == 'configs/ppo.py:local'
  own.write_text('from base import get_config\n')
  assert config_files.resolve('configs/ppo.py:local') == 'configs/ppo.py:local'


@pytest.mark.parametrize(
  'text, message',
  [
    ('def get_config():\n  pass\n', 'this config has no presets; use --config=own.py'),
    ('x = 1\n', r'has no get_config\(\), so it is not a config'),
    ('def\n', 'is not a Python file: '),
  ],
)
def test_a_file_that_is_not_a_config_is_a_one_line_error(elsewhere, text, message):
  (elsewhere / 'own.py').write_text(text)
  with pytest.raises(UserError, match=message) as error:
    config_files.resolve('own.py:local')
  assert '\n' not in str(error.value)


def test_missing_file_lists_the_shipped_ones(elsewhere):
  with pytest.raises(UserError, match=r'there is no file .none.py.; .*configs/ppo.py'):
    config_files.resolve('none.py')
