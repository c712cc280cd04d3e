"""Answers of the command line that start no run: --help, settings, help TOPIC."""

import difflib
import re
import textwrap

from segjax.config import config_files, topics
from segjax.errors import UserError

COMMANDS = {
  'settings [SECTION]': 'every config key with its default, description and choices',
  'metrics [NAME]': 'what each metric is, its healthy range, and remedies',
  'help TOPIC': 'explains ' + ', '.join(list(topics.TOPICS)[:5]) + ', ...',
  'plan JOB[:PRESET]': 'memory and time of each phase, without the devices',
  'replay RUN STEP': 'a step of a run computed again: the same to the bit, or what differs',
  'convert ...': 'checkpoints: import, export, merge, push, verify, inspect',
}

_USAGE = """\
segjax: segment-level RLHF for Llama-3 in JAX and Flax

usage: segjax JOB[:PRESET] [--workdir=DIRECTORY] [--dry_run[=full]] [--config.KEY=VALUE ...]
       segjax COMMAND [ARGUMENT]

`segjax ppo:local` is `python -m segjax.main --config=configs/ppo.py:local`.
"""
_EXAMPLES = """\
examples:
  segjax ppo                                      the demo from nothing: minutes on two cores
  segjax sft:local --config.policy.path=MODEL --config.data.path=CHATS
  segjax ppo:local --dry_run --config.policy.path=SFT --config.reward_model.path=RM \\
    --config.data.path=PROMPTS --config.ppo.kl_coef=0.1

`segjax JOB --help` describes a job, `segjax --helpfull` lists all flags.
"""


def overview() -> str:
  """Returns the text of --help: jobs with their presets, commands and examples."""
  lines = [_USAGE, 'jobs:']
  for config in config_files.shipped_configs():
    lines.append(f'  {config.name:<18}{config.docstring.splitlines()[0]}')
    if names := presets(config):
      first, *rest = textwrap.wrap(', '.join(names), 70)
      lines += [f'{"":<20}presets: {first}', *(f'{"":<29}{line}' for line in rest)]
  lines += ['', 'commands:']
  lines += [f'  {command:<22}{text}' for command, text in COMMANDS.items()]
  return '\n'.join([*lines, '', _EXAMPLES])


def presets(config: config_files.ConfigFile) -> list[str]:
  """Returns the names of presets in the paragraph 'Presets: ...' of the config's docstring."""
  match = re.search(
    r'^Presets: (.*?)(?:[;.](?:\s|$)|\n\n)', config.docstring, re.DOTALL | re.MULTILINE
  )
  if not match:
    return []
  return [re.sub(r'\s*\(.*', '', name).strip() for name in match[1].split(',')]


def topic(name: str) -> str:
  """Returns the text of a topic, or the docstring of a job's config file.

  Raises:
    UserError: there is no such topic.
  """
  names = {config.name: config.docstring for config in config_files.shipped_configs()}
  names |= topics.TOPICS
  if name not in names:
    raise UserError(f'help {name}: there is no such topic; {_suggest(name, names)}')
  return names[name]


def list_topics() -> str:
  """Returns the names of the topics."""
  return 'segjax help TOPIC, with TOPIC one of ' + ', '.join(topics.TOPICS)


def config_argument(job: str) -> str:
  """Returns --config=configs/JOB.py[:PRESET] for JOB[:PRESET].

  Raises:
    UserError: there is no such job.
  """
  name, colon, preset = job.partition(':')
  names = [config.name for config in config_files.shipped_configs()]
  if name not in names:
    commands = [command.partition(' ')[0] for command in COMMANDS]
    raise UserError(
      f'{name}: there is no such job or command; {_suggest(name, [*names, *commands])}'
    )
  return f'--config=configs/{name}.py{colon}{preset}'


def _suggest(name: str, names: list[str] | dict[str, str]) -> str:
  near = difflib.get_close_matches(name, names, n=1)
  return f'did you mean {near[0]}?' if near else f'choose one of {", ".join(names)}.'
