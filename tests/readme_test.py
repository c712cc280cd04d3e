"""README.md is correct: its commands parse, its examples run, its settings exist."""

import argparse
import copy
import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from fixtures import hf_models, runs, tokenizers
from ml_collections import config_flags

import segjax.api
from segjax import main
from segjax.config import parse, usage
from segjax.config.settings import Segmentation, Settings
from segjax.data.sources import as_conversation, as_pair, as_prompt
from segjax.jobs import dry_run, pipeline
from segjax.train.custom_reward import parse_token_rewards
from segjax.train.response_functions import Response
from segjax.train.user_functions import load_function
from segjax.types import Normalizer

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
INLINE = re.findall(
  r'`([^`\n]+(?:\n[^`\n]+)?)`', re.sub(r'^```.*?^```$', '', README, flags=re.M | re.S)
)


def _code(language):
  return [text for kind, text in BLOCKS if kind == language]


def _commands():
  """Returns every command in blocks and sentences, without the gcloud or srun around it."""
  lines = re.sub(r'\\\n\s*', '', '\n'.join(_code(''))).splitlines()
  lines += [text.replace('\n', ' ') for text in INLINE]
  commands = []
  for line in lines:
    if inner := re.search(r"--command='([^']*)'", line):
      line = inner[1]
    for part in line.split(' && '):
      words = re.sub(r'^srun( --\S+)* ', '', part.strip())
      if re.match(r'(python|segjax|pip) ', words):
        commands.append(shlex.split(words, comments=True))
  return commands


COMMANDS = _commands()
RUNS = [
  words[3:]
  for words in COMMANDS
  if words[:3] == ['python', '-m', 'segjax.main'] and words[-1] != '...'
]
TOOLS = [words[1:] for words in COMMANDS if words[0] == 'python' and words[1].startswith('tools/')]
ANSWERS = [
  words[1:]
  for words in COMMANDS
  if words[0] == 'segjax' and words[1] not in ('convert', 'plan', 'replay')
]


def test_commands_are_extracted():
  assert len(RUNS) >= 6 and len(TOOLS) >= 2 and len(ANSWERS) >= 5
  others = (['python', '-m', 'segjax.main'], ['python', '-m', 'pytest'])
  for words in COMMANDS:
    is_tool = words[0] == 'python' and words[1].startswith('tools/')
    assert is_tool or words[:3] in others or words[0] == 'segjax' or words[:2] == ['pip', 'install']


def test_readme_is_short():
  assert len(README.split()) <= 2000


@pytest.mark.parametrize('arguments', ANSWERS, ids=' '.join)
def test_commands_that_print(arguments):
  if '...' in arguments:  # `segjax ppo:local ...` starts a run
    assert usage.config_argument(arguments[0])
  else:
    assert len(main.answer(arguments)) > 200


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
  """A directory where README's paths exist: tiny models under runs/mine, and files of rows."""
  directory = tmp_path_factory.mktemp('readme')
  runs.policy(directory / 'untrained')
  models = directory / 'runs' / 'mine'
  for stage in ('sft', 'ppo'):
    # Of any text: the words of the examples are not those of the built-in language.
    model = hf_models.write(models / stage / 'model', vocab_size=320, max_position_embeddings=512)
    tokenizers.write_tokenizer(model)
  normalizer = Normalizer(w_mean=0.1, b_mean=-0.2, w_std=0.0, b_std=0.8)
  runs.reward_model(
    models / 'sft' / 'model', models / 'reward' / 'model', normalizer, Segmentation()
  )
  chats, pairs, prompts = (text for text in _code('json'))
  rows = {'chats': chats, 'pairs': pairs, 'prompts': prompts, 'held_out': prompts, 'rows': chats}
  rows['more_pairs'] = pairs
  rows['questions'] = '{"question_id": 81, "category": "writing", "turns": ["2 + 2?", "And 3?"]}\n'
  span = '{"start": 0, "end": 1, "type": "wrong"}'
  rows['spans'] = f'{{"prompt": "2 + 2?", "response": "5.", "spans": [{span}]}}\n'
  for name, row in rows.items():
    (directory / f'{name}.jsonl').write_text(row * 400)
  return directory


_MODELS = {'MODEL', 'CHECKPOINT', 'SFT', 'SFT_MODEL', 'REWARD', 'HF'}


@pytest.mark.parametrize('arguments', RUNS, ids=' '.join)
def test_commands_pass_a_dry_run(arguments, workspace, monkeypatch, capsys):
  monkeypatch.chdir(workspace)
  monkeypatch.syspath_prepend(str(REPOSITORY))
  (workspace / 'configs').exists() or (workspace / 'configs').symlink_to(REPOSITORY / 'configs')
  line = ['segjax']
  for word in arguments:
    key, equals, value = word.partition('=')
    value = 'configs/ppo.py' if value == '...' else value
    line.append(
      key + equals + (str(workspace / 'untrained/demo/model') if value in _MODELS else value)
    )
  values = flags.FlagValues()
  for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]:
    if flag.name != 'config' and not flag.name.startswith('config.'):
      values[flag.name] = copy.deepcopy(flag)
  config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=line)
  assert values(line) == ['segjax']
  settings = parse.from_config(values['config'].value)
  workdir = Path(values['workdir'].value or workspace / 'default')
  stages = pipeline.prepare(settings, workdir, runs.one_device())
  dry_run.run(settings, stages)
  out = capsys.readouterr().out
  assert 'the settings are consistent' in out
  is_open = '--config=...' in arguments or 'llama3' in str(arguments) or 'chat.py' in str(arguments)
  assert is_open or 'required but not set' not in out


class _ParsedError(Exception):
  """Raised once the arguments are parsed."""


@pytest.fixture
def only_parse(monkeypatch):
  """Stops a program once argparse has taken its arguments."""
  parse = argparse.ArgumentParser.parse_args

  def parse_and_stop(self, *arguments, **more):
    parse(self, *arguments, **more)
    raise _ParsedError

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)


_ARGPARSE_TOOLS = [words for words in TOOLS if words[0] != 'tools/convert_hf.py']


@pytest.mark.parametrize('words', _ARGPARSE_TOOLS, ids=' '.join)
def test_tools_take_their_arguments(words, only_parse, monkeypatch):
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setattr(sys, 'argv', words)
  with pytest.raises(_ParsedError):
    runpy.run_path(str(REPOSITORY / words[0]), run_name='__main__')


def test_plans_take_their_arguments():
  """Runs in a new process, because absl defines each flag only once."""
  plans = [words for words in COMMANDS if words[:2] == ['segjax', 'plan']]
  assert plans
  script = (
    'import sys\nfrom segjax import main\nfrom segjax.config import command_line\n'
    'main.run = lambda f: print(command_line.parse_flags(sys.argv))'
  )
  for words in plans:
    more = f'\nsys.argv = {words!r}\nmain.cli()'
    done = subprocess.run(
      [sys.executable, '-c', script + more], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == str(words[:1]), done.stderr


def test_tools_exist():
  for words in TOOLS:
    assert (REPOSITORY / words[0]).is_file(), words


def _leaves():
  keys = set()

  def walk(cls, prefix):
    for field in dataclasses.fields(cls):
      value = getattr(cls(), field.name)
      keys.add(prefix + field.name)
      if dataclasses.is_dataclass(value):
        walk(type(value), f'{prefix}{field.name}.')

  walk(Settings, '')
  return keys


def _is_file_or_module(name):
  """Returns whether it is a file, or a name in a module that can be imported."""
  if re.search(r'\.(py|json|jsonl|parquet|safetensors|md|old|png|gz)\b', name):
    return True
  return importlib.util.find_spec(name.partition('.')[0]) is not None or name.startswith('rl.')


def test_settings_in_backticks_exist():
  leaves, num_checked = _leaves(), 0
  lasts = {leaf.rpartition('.')[2] for leaf in leaves}
  for text in (*INLINE, *re.findall(r'--config\.[a-z][\w.]+', README)):
    match = re.fullmatch(r'(?:--)?(?:config)?(\.?[a-z_]\w*(?:\.[a-z_]\w*)*)(?:=.*)?', text.strip())
    name = match[1] if match else ''
    if name and text.startswith(('--config.', 'config.')):
      parse.check_key(name.lstrip('.'))
    elif name.startswith('.') and name.count('.') == 1:
      assert name[1:] in lasts or name in ('.jsonl', '.json', '.parquet', '.gz'), text
    elif name.endswith('.html'):
      continue
    elif '.' in name and name.partition('.')[0] in leaves:
      parse.check_key(name)
    elif '.' in name:
      assert _is_file_or_module(name), f'{text} is not a setting'
      continue
    else:
      continue
    num_checked += 1
  assert num_checked > 25


def test_example_rows_are_read():
  chat, pair, prompt = (json.loads(text) for text in _code('json'))
  assert as_conversation(chat)[-1]['role'] == 'assistant'
  assert as_pair(pair).rating_gap == 7
  assert as_prompt(prompt) == as_prompt(pair) == as_prompt(chat)


def test_reward_function_example(tmp_path, monkeypatch):
  (text,) = (text for text in _code('python') if text.startswith('def reward'))
  (tmp_path / 'my_rules.py').write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'my_rules', raising=False)
  function = load_function('my_rules:reward', 'reward_shaping.reward_fn')
  response = 'a. Sorry. b'
  letters = Response(0, '', list(map(ord, response)), response, '', lambda ids: list(map(chr, ids)))
  rewards = parse_token_rewards(function('', response), letters)
  assert rewards == [(1, 0.1), (8, 0.1), (10, -1)]
  assert function('', 'no sentence') == []
  sys.modules.pop('my_rules')


def test_python_example_runs(workspace, monkeypatch, capsys):
  (text,) = (text for text in _code('python') if text.startswith('import segjax'))
  assert len([line for line in text.splitlines() if line]) == 10
  monkeypatch.chdir(workspace)
  monkeypatch.setattr(segjax.api, 'make_mesh', runs.one_device)
  names = {}
  exec(compile(text, 'README.md', 'exec'), names)
  first, *segments = capsys.readouterr().out.splitlines()
  assert float(first.split()[0]) < 0
  assert names['answer'].text and names['answer'] != names['second']
  scored = names['judge'].score([names['chat']])[0].segments
  assert scored and len(segments) > len(scored)
  last = scored[-1]  # at p = 1: Mean -0.2, Std 0.8; both numbers have four digits
  assert last.normalized_score == pytest.approx((last.score + 0.2) / 0.8, abs=2e-4)


def test_named_functions_of_rl_exist():
  from segjax import rl

  names = [name for text in INLINE for name in re.findall(r'^rl\.(\w+)$', text)]
  assert len(names) >= 5 and set(names) <= set(rl.__all__)
