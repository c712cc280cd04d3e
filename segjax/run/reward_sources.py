"""Finds the reward models and functions of config.rewards, and how they are read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from segjax.config.reward_lines import RewardLine, reward_functions, reward_models
from segjax.config.settings import RewardModelSettings, Segmentation, Settings
from segjax.config.validate import resolve_spread
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig
from segjax.run.inputs import resolve_checkpoint
from segjax.train import reward_spec
from segjax.train.collect import ListedSources
from segjax.train.custom_reward import load_listed_functions
from segjax.train.recipe import RewardSource
from segjax.train.reward_spec import RewardSpec
from segjax.train.segmenter import make_segmenter

_LINEAR = ('mean', 'sum')  # aggregations of which the parts of a sum add up


def resolve(settings: Settings, policy: Path) -> tuple[dict[str, Path], dict[str, RewardSpec]]:
  """Returns the directories of the reward models by network, and how to read them by name.

  Args:
    settings: of the run.
    policy: directory of the policy, whose tokenizer they share.

  Raises:
    UserError: names the line, and what is missing or does not fit.
  """
  paths, specs = {}, {}
  for line in reward_models(settings.rewards):
    directory = resolve_checkpoint(line.path, line.key)
    try:
      own = _with_defaults(line, settings.reward_model, directory)
      specs[line.name] = reward_spec.resolve_spec(own, directory, policy)
    except UserError as error:
      raise UserError(f'config.rewards: {line.name}: {error}') from error
    paths[line.network] = directory
  return paths, specs


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
  tokenizer: ChatTokenizer,
) -> tuple[RewardSource, ...]:
  """Returns the reward models of config.rewards as constants of a recipe.

  Args:
    settings: of the run.
    specs: how to read them, by name.
    configs: networks by name.
    tokenizer: of the policy.
  """
  return tuple(
    RewardSource(
      name=line.name,
      key=line.network,
      network=configs[line.network],
      segmenter=make_segmenter(specs[line.name].segmentation, tokenizer),
      spread=resolve_spread(settings, specs[line.name].segmentation.granularity, line.spread),
      weight=line.weight,
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
