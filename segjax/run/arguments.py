"""Makes settings from the arguments of a Python call; errors name arguments, not config keys."""

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from segjax.config.parse import from_config
from segjax.config.settings import Segmentation, SegmentationOverrides, Settings
from segjax.data.tokenizer import MissingChatTemplateError
from segjax.errors import UserError
from segjax.hf.reader import resolve_checkpoint

# Config keys, as messages of the settings name them, by the arguments that set them.
_ARGUMENTS = {
  'config.runtime.compute_dtype': 'dtype',
  'config.data.chat_template': 'chat_template',
  'config.reward_model.segmentation': 'segmentation',
  'config.reward_model.': '',
  'config.reward.segmentation.': '',
  'config.rollout.': '',
}
# How a reward model of others is read.
_READING = ('reads', 'head', 'positive', 'negative', 'step_tag', 'step_delimiter')


def section_settings(section: str, kind: type, options: dict[str, Any]) -> Settings:
  """Returns the default settings with the options in one section."""
  check_options(options, [field.name for field in dataclasses.fields(kind)])
  with name_arguments():
    return make_settings({f'{section}.{name}': value for name, value in options.items()})


def reward_model_settings(
  options: dict[str, Any],
  *,
  segmentation: Segmentation | SegmentationOverrides | None,
  dtype: str,
  chat_template: str,
) -> Settings:
  """Returns the default settings with these of a reward model.

  Args:
    options: of `_READING`.
    segmentation: its fields that are not None.
    dtype: of weights and arithmetic.
    chat_template: as config.data.chat_template.
  """
  check_options(options, _READING)
  own = dataclasses.asdict(segmentation or SegmentationOverrides())
  values = {'reward_model.segmentation': own} | {
    f'reward_model.{name}': value for name, value in options.items()
  }
  with name_arguments():
    return make_settings(
      values | {'runtime.compute_dtype': dtype, 'data.chat_template': chat_template}
    )


def check_options(options: Iterable[str], names: Sequence[str]) -> None:
  """Raises UserError if an option is not one of the names."""
  for name in options:
    if name not in names:
      near = difflib.get_close_matches(name, names, n=2)
      hint = f'did you mean {" or ".join(near)}?' if near else f'use {", ".join(names)}.'
      raise UserError(f'{name} is not an option; {hint}')


def make_settings(overrides: dict[str, Any]) -> Settings:
  """Returns the default settings with dotted keys replaced, checked like those of a config."""
  values = dataclasses.asdict(Settings(stages=('chat',)))
  for key, value in overrides.items():
    *sections, last = key.split('.')
    functools.reduce(dict.__getitem__, sections, values)[last] = value
  return from_config(ConfigDict(values))


@contextlib.contextmanager
def name_arguments() -> Iterator[None]:
  """Names arguments instead of config keys in the errors of the block."""
  try:
    yield
  except MissingChatTemplateError:
    raise
  except UserError as error:
    message = str(error)
    for key, argument in _ARGUMENTS.items():
      message = message.replace(key, argument)
    raise UserError(message) from error


def resolve_path(argument: str, path: str) -> Path:
  """Returns the directory of a checkpoint; errors name the argument."""
  try:
    return resolve_checkpoint(path)
  except ValueError as error:
    raise UserError(f'{argument}={path!r}: {error}') from error


def check_is_list(texts: Any) -> list[Any]:
  """Returns the texts as a list; raises UserError if they are a single text."""
  if isinstance(texts, dict):
    raise UserError('expected a list of texts, got a single message; put it in [[ and ]].')
  if isinstance(texts, str):
    raise UserError('expected a list of texts, got a single text; put it in brackets.')
  texts = list(texts)
  if texts and isinstance(texts[0], dict):
    raise UserError('expected a list of texts, got a single text; put it in brackets.')
  return texts
