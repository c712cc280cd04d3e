"""Resolves and loads the inputs of a job, and checks their paths before the first stage."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from segjax.config.settings import Compat, Data, RolloutSettings, Settings, replace
from segjax.data.batches import eval_batches
from segjax.data.lazy_rows import open_rows
from segjax.data.limits import Limits, describe_counts
from segjax.data.pair_rules import PairRules
from segjax.data.rows import Reading, Rows
from segjax.data.source_list import parse_sources
from segjax.data.sources import is_hub_id
from segjax.data.tokenizer import ChatTokenizer, MissingChatTemplateError, load_tokenizer
from segjax.errors import UserError, excerpt, first_line
from segjax.hf import reader
from segjax.hf.adapter_config import tokenizer_directory
from segjax.model.llama import LlamaConfig
from segjax.report.console import track


def expand_path(key: str, path: str) -> Path:
  """Returns a local path with ~ replaced by the home directory.

  Raises:
    UserError: the operating system cannot look it up: a name is too long, ~ names no user, ...
  """
  try:
    local = Path(path).expanduser()
    local.exists()
  except (OSError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{key}={excerpt(path)} cannot be looked up ({reason}); use another.'
    ) from error
  return local


def check_path(key: str, path: str, directory: Path) -> None:
  """Checks that a path exists or lies on a bucket or hub, and that the run does not write to it.

  Raises:
    UserError: the path does not exist, or lies in `directory`.
  """
  if not path or '://' in path:
    return
  local = expand_path(f'config.{key}', path)
  if not local.exists() and not is_hub_id(path):
    raise UserError(
      f'config.{key}={path!r} does not exist and is not a hub id; give a path or owner/name.'
    )
  if local.absolute().is_relative_to(directory.absolute()):
    raise UserError(
      f'config.{key}={path!r} lies in {directory}, which this run writes; use another --workdir.'
    )


def check_creatable(key: str, directory: str) -> None:
  """Checks that a local directory exists or can be created, without creating it.

  Raises:
    UserError: a file is in the way, or the directory above cannot be written to.
  """
  if not directory or '://' in directory:
    return
  path = expand_path(key, directory).absolute()
  above = next(parent for parent in (path, *path.parents) if parent.exists())
  if not above.is_dir() or not os.access(above, os.W_OK):
    problem = 'cannot be written to' if above.is_dir() else 'is not a directory'
    raise UserError(f'{key}={directory} cannot be created: {above} {problem}; use another one.')


def check_writable(directory: str) -> None:
  """Creates config.checkpoint.directory, if it is set.

  Raises:
    UserError: the directory cannot be created.
  """
  if not directory:
    return
  try:
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
  except Exception as error:  # each kind of bucket raises its own exceptions
    raise UserError(
      f'config.checkpoint.directory={directory!r} cannot be created: {first_line(error)}. '
      'A bucket needs its package; gs:// needs `pip install gcsfs`.'
    ) from error


def resolve_checkpoint(path: str, key: str) -> Path:
  """Returns the directory of the checkpoint that config.`key` names; downloads it if needed."""
  try:
    return reader.resolve_checkpoint(path)
  except ValueError as error:
    raise UserError(f'config.{key}: {error}') from error


def load_chat_tokenizer(directory: Path, data: Data, fallback: Path | None = None) -> ChatTokenizer:
  """Loads the tokenizer of a checkpoint, with the chat template and the date of config.data.

  Args:
    directory: the checkpoint, whose own template is that of its training.
    data: config.data.
    fallback: checkpoint with the same tokenizer, read if `directory` has no chat template.
  """
  try:
    return load_tokenizer(
      str(tokenizer_directory(directory)), data.chat_template, data.template_date
    )
  except MissingChatTemplateError:
    if fallback is None:
      raise
    other = tokenizer_directory(fallback)
    return load_tokenizer(str(other), data.chat_template, data.template_date)


def log_other_template(
  tokenizer: ChatTokenizer, directory: Path, data: Data, log: Callable[[str], None]
) -> None:
  """Logs a warning if the model of `directory` was made with another chat template."""
  if difference := find_other_template(tokenizer, directory, data):
    ours, theirs = difference
    log(
      f'warning: {directory} was made with another chat template: it reads {ours!r} here, and '
      f'{theirs!r} by its own; train both with one template, or set data.chat_template'
    )


def find_other_template(
  tokenizer: ChatTokenizer, directory: Path, data: Data
) -> tuple[str, str] | None:
  """Returns a text by the template of `tokenizer` and by that of a model; None if they are equal.

  Also None of a model without a template, which does not say how it was trained.
  """
  try:
    other = load_tokenizer(str(tokenizer_directory(directory)), date=data.template_date)
  except UserError:
    return None
  messages = [{'role': 'user', 'content': 'A question'}]
  ours, theirs = (
    t.prompt_text(messages) + t.response_texts(messages, t.prompt_text(messages), ['An answer'])[0]
    for t in (tokenizer, other)
  )
  return (ours, theirs) if ours != theirs else None


def with_stage_data(settings: Settings, stage: str) -> Settings:
  """Returns the settings with the path and split of config.STAGE.data in those of config.data."""
  own = getattr(getattr(settings, stage, None), 'data', None)
  values = {f'data.{key}': value for key, value in (vars(own) if own else {}).items() if value}
  return replace(settings, **values)


def load_config_rows(data: Data, log: Callable[[str], None] | None = None) -> Rows:
  """Opens the rows of config.data, see `lazy_rows.open_rows`.

  Args:
    data: config.data.
    log: called with a line of text if roles are renamed or rows dropped, while the rows are read.
  """
  columns = {ours: theirs for ours, theirs in vars(data.columns).items() if theirs}
  reading = Reading(columns, drop_bad=data.bad_rows == 'drop', log=log)
  return open_rows(data.path, data.split, data.max_rows, reading)


def count_local_rows(data: Data) -> int:
  """Returns the number of rows of config.data, 0 if they are not local.

  Lines of large files are counted but not parsed, see `json_rows.read_rows`.
  """
  sources = parse_sources(data.path)
  if not sources or not all(Path(source.path).expanduser().exists() for source in sources):
    return 0
  return len(load_config_rows(data))


def length_limits(data: Data, config: LlamaConfig, log: Callable[[str], None]) -> Limits:
  """Returns the limits on prompt and response together, at most the network's positions.

  If the network has fewer positions than config.data.max_length, prompts keep their share of it.
  """
  positions = config.max_position_embeddings
  if data.max_length <= positions:
    return Limits(data.max_length, data.max_prompt_length, data.overlong_policy)
  max_prompt = max(1, data.max_prompt_length * positions // data.max_length)
  log(
    f'rows are limited to {positions} tokens, the model’s max_position_embeddings (or what its '
    f'sliding window or longrope leaves of them; config.data.max_length={data.max_length})'
  )
  return Limits(positions, max_prompt, data.overlong_policy)


def fit_responses(
  max_new_tokens: int, configs: dict[str, LlamaConfig], key: str, log: Callable[[str], None]
) -> int:
  """Returns `max_new_tokens`, or half of the positions where it would leave none for a prompt.

  Args:
    max_new_tokens: maximum length of a response.
    configs: the networks that read prompt and response, by name.
    key: the config key of `max_new_tokens`.
    log: called with a line of text if the responses are shortened.
  """
  name, positions = _fewest_positions(configs)
  if max_new_tokens < positions:
    return max_new_tokens
  log(
    f'responses have at most {positions // 2} tokens, half of the {positions} positions of the '
    f'{name} (config.{key}={max_new_tokens})'
  )
  return positions // 2


def fit_rollout(
  rollout: RolloutSettings, configs: dict[str, LlamaConfig], log: Callable[[str], None]
) -> RolloutSettings:
  """Returns config.rollout with responses that fit into the networks, see `fit_responses`."""
  key = 'rollout.max_new_tokens'
  max_new_tokens = fit_responses(rollout.max_new_tokens, configs, key, log)
  return dataclasses.replace(rollout, max_new_tokens=max_new_tokens)


def prompt_limits(
  data: Data,
  configs: dict[str, LlamaConfig],
  max_new_tokens: int,
  log: Callable[[str], None],
) -> Limits:
  """Returns the limits on prompts whose responses have up to `max_new_tokens` tokens.

  Args:
    data: config.data.
    configs: the networks that read prompt and response, by name.
    max_new_tokens: maximum length of a response, as `fit_responses` returns it.
    log: called with a line of text if prompts are limited further than config.data does.
  """
  name, positions = _fewest_positions(configs)
  max_prompt = min(data.max_prompt_length, positions - max_new_tokens)
  if max_prompt < data.max_prompt_length:
    log(
      f'prompts are limited to {max_prompt} tokens: the {name} has {positions} positions, and '
      f'responses take up to {max_new_tokens}'
    )
  return Limits(max_prompt, max_prompt, data.overlong_policy)


def _fewest_positions(configs: dict[str, LlamaConfig]) -> tuple[str, int]:
  """Returns the network with the fewest positions, by name, and their number."""
  positions = {name: config.max_position_embeddings for name, config in configs.items()}
  return min(positions.items(), key=lambda item: item[1])


def pair_rules(compat: Compat, ratings: bool = False) -> PairRules:
  """Returns how pairs are tokenised under config.compat, and whether their ratings are read.

  Rows with labels of steps may lie among them.
  """
  return PairRules(
    ratings=ratings,
    force_stop=compat.keep_degenerate_pairs,
    keep_identical=compat.keep_degenerate_pairs,
    strip_system_preamble=compat.strip_system_preamble,
    skip_labelled=True,
  )


def log_dataset(dataset: Any, log: Callable[[str], None]) -> None:
  """Logs how many rows were read, truncated and dropped, and the length they are padded to."""
  used = '' if len(dataset) == dataset.counts['rows'] else f'; {len(dataset)} used'
  log(f'{describe_counts(dataset.counts)}{used}, padded to {dataset.length} tokens')


def tracked_batches(
  stage_name: str, num_rows: int, batch_size: int, note: str = ''
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields `eval_batches` with a progress bar on the console."""
  num_batches = -(-num_rows // batch_size)
  return track(stage_name, eval_batches(num_rows, batch_size), num_batches, note)
