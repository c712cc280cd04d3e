"""Loads a reward model that reads text: of another tokenizer or chat template than the policy."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, SupportsIndex

from jax.sharding import Mesh

from segjax.config.settings import Data, Segmentation, Settings
from segjax.data.batches import Pairs, Prompts
from segjax.data.rows import Rows
from segjax.data.sources import Message, as_pair
from segjax.data.tokenizer import ChatTokenizer, MissingChatTemplateError
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig
from segjax.run import inputs
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.train.text_reward import TextReward
from segjax.train.text_scoring import StepMarks, TextScorer


class TextModel(NamedTuple):
  """A reward model that reads text, before its weights are loaded.

  Attributes:
    path: its directory.
    scorer: its network and tokenizer.
  """

  path: Path
  scorer: TextScorer

  def reward(self, tokenizer: ChatTokenizer) -> TextReward:
    """Returns the reward of responses in the tokens of `tokenizer`."""
    return TextReward(self.scorer, tokenizer)


def reads_text(settings: Settings, directory: Path, policy: Path) -> bool:
  """Returns whether a reward model reads text, as config.reward_model.reads says.

  With 'auto' it does if its tokenizer is not the policy's, or if its chat template writes a
  conversation differently and config.data.chat_template does not replace both.

  Args:
    settings: `reward_model` and `data` are read.
    directory: of the reward model.
    policy: directory of the policy.
  """
  how = settings.reward_model.reads
  if how != 'auto' or settings.reward_model.step_tag:
    return how != 'tokens'
  stored = reward_spec.read_spec(directory, with_normalizer=False)
  sha256 = stored.tokenizer_sha256 if stored else ''
  if not reward_spec.shares_tokenizer(directory, policy, sha256):
    return True
  if settings.data.chat_template:
    return False
  try:
    tokenizer = inputs.load_chat_tokenizer(policy, settings.data)
  except MissingChatTemplateError:
    return False  # it is said where the tokenizer is loaded for the run
  return inputs.find_other_template(tokenizer, directory, settings.data) is not None


def load_text_model(
  settings: Settings,
  directory: Path,
  config: LlamaConfig,
  spec: RewardSpec,
  mesh: Mesh,
  log: Callable[[str], None],
  key: str = 'config.reward_model.',
) -> TextModel:
  """Returns a reward model that reads text; loads no weights.

  Args:
    settings: `reward_model`, which says how it is read, `reward_shaping` and `data` are read.
    directory: of the model.
    config: its network.
    spec: where its scores are read.
    mesh: the devices.
    log: called with a line of text.
    key: what errors write in front of the names of settings of `reward_model`.

  Raises:
    UserError: it has no chat template, or a setting needs its scores at every token of the policy.
  """
  check_text_settings(settings, spec.segmentation, directory)
  tokenizer = _load_own_tokenizer(directory, settings.data).for_networks({'reward model': config})
  marks = StepMarks(settings.reward_model.step_tag, settings.reward_model.step_delimiter)
  if marks.tag:
    _check_tag(tokenizer, marks.tag, directory, key)
  read = f'; the score of a step is read at {marks.tag!r} behind it' if marks.tag else ''
  log(f'{directory} reads text, by its own tokenizer and chat template{read}')
  return TextModel(directory, TextScorer(config, tokenizer, mesh, marks))


def check_text_settings(settings: Settings, segmentation: Segmentation, directory: Path) -> None:
  """Raises UserError if a setting needs scores of a text at every token of the policy.

  Args:
    settings: `reward_shaping` is read.
    segmentation: of the responses.
    directory: of the reward model.
  """
  shaping, how = settings.reward_shaping, f'{directory} reads text, not the policy’s tokens'
  if segmentation.boundary == 'score_jump' and segmentation.granularity == 'segment':
    raise UserError(
      f'{how}, and boundary=score_jump cuts by its score at every token; use another boundary of '
      'its segmentation.'
    )
  if shaping.redistribute in ('gradient', 'attention'):
    raise UserError(
      f'{how}, and config.reward_shaping.redistribute={shaping.redistribute} reads inside it at '
      'every token; use red or none.'
    )


def _check_tag(tokenizer: ChatTokenizer, tag: str, directory: Path, key: str) -> None:
  ids, unknown = tokenizer.encode([tag])[0], tokenizer.tokenizer.unk_token_id
  if not len(ids) or unknown in list(ids):
    raise UserError(
      f'{key}step_tag={tag!r} is not in the vocabulary of {directory}; name the tag '
      'that it was trained with.'
    )


def _load_own_tokenizer(directory: Path, data: Data) -> ChatTokenizer:
  """Loads a tokenizer with its own chat template, or that of config.data if it has none."""
  try:
    return inputs.load_chat_tokenizer(directory, dataclasses.replace(data, chat_template=''))
  except MissingChatTemplateError:
    return inputs.load_chat_tokenizer(directory, data)


def check_prompts(models: Iterable[TextModel], prompts: Prompts) -> None:
  """Raises UserError if the chat template of a reward model refuses a prompt; names its row."""
  for model in models:
    located = (
      (prompts.source.location(int(row)), prompts.messages(index))
      for index, row in enumerate(prompts.row)
    )
    check_messages(model.scorer.tokenizer, model.path, located)


def check_messages(
  tokenizer: ChatTokenizer, directory: Path, prompts: Iterable[tuple[str, list[Message]]]
) -> None:
  """Raises UserError if the chat template of a reward model refuses a prompt; names its row.

  Args:
    tokenizer: of the reward model.
    directory: of the reward model.
    prompts: location and messages of each.
  """
  for location, messages in prompts:
    try:
      tokenizer.prompt_text(messages)
    except UserError as error:
      raise UserError(f'{location}, as {directory} reads it: {error}') from error


def pair_prompt(rows: Rows, pairs: Pairs, index: SupportsIndex) -> tuple[str, list[Message]]:
  """Returns location and prompt of a pair, as written; `rows` are those that it comes from."""
  row = int(pairs.row[index])
  location = rows.location(row)
  return location, as_pair(rows[row], location, ratings=False).prompt
