"""Finds the reward models and functions of config.rewards, and how they are read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from segjax.config.reward_lines import RewardLine, reward_functions, reward_models
from segjax.config.settings import RewardModelSettings, Segmentation, Settings
from segjax.config.validate import resolve_spread
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig
from segjax.run.inputs import resolve_checkpoint
from segjax.run.text_model import reads_text
from segjax.train import reward_spec
from segjax.train.collect import ListedSources
from segjax.train.custom_reward import load_listed_functions
from segjax.train.recipe import RewardSource
from segjax.train.reward_spec import RewardSpec
from segjax.train.segmenter import make_segmenter

_LINEAR = ('mean', 'sum')  # aggregations of which the parts of a sum add up


class Listed(NamedTuple):
  """The reward models of config.rewards.

  Attributes:
    paths: directories of those that read the policy's tokens, by the names of their networks.
    texts: of those that read text.
    specs: how to read them, by their own names.
    how: what their lines say of that, by the names of their networks.
  """

  paths: dict[str, Path]
  texts: dict[str, Path]
  specs: dict[str, RewardSpec]
  how: dict[str, RewardModelSettings]


def resolve(settings: Settings, policy: Path) -> Listed:
  """Returns where the reward models are, and how to read them.

  Args:
    settings: of the run.
    policy: directory of the policy.

  Raises:
    UserError: names the line, and what is missing or does not fit.
  """
  listed = Listed({}, {}, {}, {})
  for line in reward_models(settings.rewards):
    directory = resolve_checkpoint(line.path, line.key)
    try:
      own = _with_defaults(line, settings.reward_model, directory)
      is_text = reads_text(dataclasses.replace(settings, reward_model=own), directory, policy)
      listed.specs[line.name] = reward_spec.resolve_spec(
        own, directory, None if is_text else policy
      )
    except UserError as error:
      raise UserError(f'config.rewards: {line.name}: {error}') from error
    listed.how[line.network] = line.model_settings()
    (listed.texts if is_text else listed.paths)[line.network] = directory
  return listed


def _with_defaults(
  line: RewardLine, first: RewardModelSettings, directory: Path
) -> RewardModelSettings:
  """Returns a line's settings; what its model has not stored either is that of the first one."""
  own = line.model_settings()
  stored = reward_spec.read_spec(directory, with_normalizer=not own.normalizer)
  if stored is None:
    values = {key: value for key, value in vars(own.segmentation).items() if value is not None}
    own = dataclasses.replace(own, segmentation=dataclasses.replace(first.segmentation, **values))
  if not own.normalizer and (stored is None or stored.normalizer is None):
    own = dataclasses.replace(own, normalizer=first.normalizer)
  return own


def check_mix(settings: Settings, segmentation: Segmentation) -> None:
  """Raises UserError if the parts of the reward models would not add up to their rewards.

  Args:
    settings: of the run.
    segmentation: of the first reward model.
  """
  granularity, aggregation = segmentation.granularity, segmentation.aggregation
  is_bandit = resolve_spread(settings, granularity) == 'bandit' and granularity != 'bandit'
  if settings.reward_shaping.mix == 'segment' and is_bandit and aggregation not in _LINEAR:
    raise UserError(
      f'config.reward_shaping.mix=segment with spread=bandit and aggregation={aggregation}: the '
      'parts of the reward models would not add up to the reward; set '
      'config.reward_model.segmentation.aggregation=mean or sum, or mix=token.'
    )


def make_sources(
  settings: Settings,
  specs: dict[str, RewardSpec],
  configs: dict[str, LlamaConfig],
  texts: dict[str, LlamaConfig],
  tokenizer: ChatTokenizer,
) -> tuple[RewardSource, ...]:
  """Returns the reward models of config.rewards as constants of a recipe.

  Args:
    settings: of the run.
    specs: how to read them, by name.
    configs: networks that read the policy's tokens, by name.
    texts: networks that read text, by name.
    tokenizer: of the policy.
  """
  return tuple(
    RewardSource(
      name=line.name,
      key=line.network,
      network=(configs | texts)[line.network],
      segmenter=make_segmenter(specs[line.name].segmentation, tokenizer),
      spread=resolve_spread(settings, specs[line.name].segmentation.granularity, line.spread),
      weight=line.weight,
      reads_text=line.network in texts,
    )
    for line in reward_models(settings.rewards)
  )


def load_listed(
  settings: Settings, specs: dict[str, RewardSpec], decode: Callable[[Any], str]
) -> ListedSources | None:
  """Loads the functions of config.rewards, and the normalisers of its reward models.

  Args:
    settings: of the run.
    specs: how to read the reward models, by name.
    decode: maps token ids to text, without special tokens.

  Returns:
    None where config.rewards is empty.
  """
  if not settings.rewards:
    return None
  functions = reward_functions(settings.rewards)
  return ListedSources(
    normalizers={name: jax.tree.map(jnp.float32, spec.normalizer) for name, spec in specs.items()},
    functions=load_listed_functions(functions, settings.reward_shaping, decode),
    weights={line.name: line.weight for line in functions},
  )
