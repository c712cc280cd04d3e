"""Loads the networks of a run, and makes the recipe and response log of PPO and evaluation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from segjax.config.conflicts import check_redistribution, check_segments
from segjax.config.lora import resolve_lora
from segjax.config.reward_lines import key_prefix
from segjax.config.settings import (
  RewardModelSettings,
  Runtime,
  Segmentation,
  Settings,
)
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.hf import reader
from segjax.hf.score_head import check_trainable_head, find_score_head
from segjax.model import host_memory
from segjax.model.llama import LlamaConfig
from segjax.run import inputs, reward_sources
from segjax.run.inputs import resolve_checkpoint
from segjax.run.network_runtime import apply_runtime
from segjax.run.stage import Stage
from segjax.run.text_model import TextModel, load_text_model, reads_text
from segjax.run.weights import Weights, check_adapter
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.train.text_reward import TextReward
from segjax.types import Normalizer

HEADS = {'policy': 'language', 'reference': 'language', 'reward': 'scalar', 'reward_lm': 'language'}
TRAINED_HEADS = {
  **dict.fromkeys(('sft', 'dpo', 'policy'), 'language'),
  **dict.fromkeys(('reward', 'critic'), 'scalar'),
}

LogFn = Callable[[str], None]
_AS_IT_IS = RewardModelSettings()


class Models(NamedTuple):
  """The models that a run names, before their weights are loaded.

  Attributes:
    paths: directories of those that read the policy's tokens, by name: 'policy', 'reference', and
      'reward' and 'reward_lm' if there are any.
    reward_spec: how responses are segmented and scores are normalised.
    configs: their networks, by name.
    listed: how to read the reward models of config.rewards, by name; their paths and networks are
      named as `reward_lines.RewardLine.network` says.
    texts: the reward models that read text, by the names of their networks.
  """

  paths: dict[str, Path]
  reward_spec: RewardSpec
  configs: dict[str, LlamaConfig]
  listed: dict[str, RewardSpec]
  texts: dict[str, TextModel]

  @property
  def text_model(self) -> TextModel | None:
    """The reward model of config.reward_model, if it reads text."""
    return self.texts.get('reward')

  def text_rewards(self, tokenizer: ChatTokenizer) -> dict[str, TextReward]:
    """Returns the rewards of the models that read text, for responses in these tokens."""
    return {name: model.reward(tokenizer) for name, model in self.texts.items()}

  @property
  def frozen(self) -> dict[str, tuple[Path, LlamaConfig]]:
    """Directory and network of each model."""
    models = {name: (path, self.configs[name]) for name, path in self.paths.items()}
    texts = {name: (model.path, model.scorer.network) for name, model in self.texts.items()}
    return models | texts


def load_network_config(
  directory: Path,
  runtime: Runtime,
  mesh: Mesh,
  log: LogFn,
  *,
  head: str = 'language',
  how: RewardModelSettings = _AS_IT_IS,
  key: str = 'config.reward_model.',
) -> LlamaConfig:
  """Loads the network of `directory`, a frozen one, with the fields that config.runtime sets.

  With a scalar head, `how` says what is read of a reward model, and errors write `key` in front of
  the names of its settings; see `score_head`.

  Raises:
    UserError: its weights are not those of the network with this head, by the headers of their
      files; its heads cannot be divided over the mesh's tensor axis.
  """
  config, reason = apply_runtime(reader.load_config(directory), runtime, mesh, trained=False)
  if head == 'scalar':
    score, description = find_score_head(directory, how, key)
    config = dataclasses.replace(config, score=score)
    if description:
      log(f'{directory}: {description}')
  reader.open_headers(directory, config, head)
  if reason:
    log(reason)
  return config


def load_trained_config(stage: Stage, network: str, directory: Path) -> LlamaConfig:
  """Loads the network of `directory`, to be trained as config.lora says.

  Args:
    stage: the stage.
    network: a network of `LoraSettings`.
    directory: of the first weights.

  Raises:
    UserError: see `load_network_config`; or the directory holds an adapter of another kind.
  """
  s, head = stage.settings, TRAINED_HEADS[network]
  stored = reader.load_config(directory)
  lora = resolve_lora(s, network)
  kept = stored.lora
  if kept and head == 'scalar':
    kept = dataclasses.replace(kept, train_head=False)  # it leaves the head to the vocabulary
  check_adapter(directory, kept, lora, network)
  if head == 'scalar':
    key = 'config.critic.init' if network == 'critic' else 'config.policy.path'
    check_trainable_head(directory, key)
  reader.open_headers(directory, stored, head)
  config, reason = apply_runtime(stored, s.runtime, stage.mesh, trained=True)
  if reason:
    stage.log(reason)
  return dataclasses.replace(config, lora=lora)


def resolve_models(settings: Settings, mesh: Mesh, log: LogFn) -> Models:
  """Returns the policy, reference and the models of the config that reward.

  Without config.reward_model.path there is no 'reward' model: rewards come from a function, or from
  the language model 'reward_lm' of config.reward_shaping.lm_reward.
  """
  paths = {
    'policy': resolve_checkpoint(settings.policy.path, 'policy.path'),
    'reference': resolve_checkpoint(settings.reference.path, 'reference.path'),
  }
  reward_model, text_paths = settings.reward_model, {}
  if reward_model.path:
    reward = resolve_checkpoint(reward_model.path, 'reward_model.path')
    is_text = reads_text(settings, reward, paths['policy'])
    spec = reward_spec.resolve_spec(reward_model, reward, None if is_text else paths['policy'])
    (text_paths if is_text else paths)['reward'] = reward
  else:
    segmentation = reward_spec.override(Segmentation(), reward_model.segmentation)
    spec = RewardSpec(segmentation, Normalizer(), 'none')
  # Before the weights are loaded, which takes minutes for a large model.
  check_segments(settings, spec.segmentation.granularity)
  check_redistribution(settings, spec.segmentation.granularity, float(spec.normalizer.w_mean))
  lm_reward = settings.reward_shaping.lm_reward
  if lm_reward.kind != 'off':
    key = 'reward_shaping.lm_reward.path'
    paths['reward_lm'] = resolve_checkpoint(lm_reward.path, key)
    reward_spec.check_tokenizer(paths['reward_lm'], paths['policy'])
  # Log-probs of the two are compared token by token.
  reward_spec.check_tokenizer(paths['reference'], paths['policy'])
  reward_sources.check_mix(settings, spec.segmentation)
  listed = reward_sources.resolve(settings, paths['policy'])
  how = {'reward': reward_model} | listed.how
  specs = {'reward': spec} | {f'reward.{name}': own for name, own in listed.specs.items()}
  texts = _load_texts(settings, text_paths | listed.texts, specs, how, mesh, log)
  paths |= listed.paths
  configs = load_network_configs(paths, settings.runtime, mesh, log, how)
  warn_of_boundaries(spec.segmentation, configs['policy'], log)
  return Models(paths, spec, configs, listed.specs, texts)


def _load_texts(
  settings: Settings,
  paths: dict[str, Path],
  specs: dict[str, RewardSpec],
  how: dict[str, RewardModelSettings],
  mesh: Mesh,
  log: LogFn,
) -> dict[str, TextModel]:
  """Loads the networks and tokenizers of reward models that read text, by network."""
  configs = load_network_configs(paths, settings.runtime, mesh, log, how)
  texts = {}
  for name, path in paths.items():
    own = dataclasses.replace(settings, reward_model=how[name])
    key = key_prefix(name)
    texts[name] = load_text_model(own, path, configs[name], specs[name], mesh, log, key)
  return texts


def warn_of_boundaries(segmentation: Segmentation, network: LlamaConfig, log: LogFn) -> None:
  """Logs a warning if the segmentation cuts nowhere, or everywhere."""
  if reason := reward_spec.describe_extreme_boundaries(segmentation, network.vocab_size):
    log(f'warning: {reason}')


def load_chat_tokenizer(settings: Settings, models: Models, log: LogFn) -> ChatTokenizer:
  """Loads the policy's tokenizer; logs a warning if a model was made with another template."""
  tokenizer = inputs.load_chat_tokenizer(models.paths['policy'], settings.data)
  for path in dict.fromkeys(models.paths.values()):
    if settings.data.chat_template or path != models.paths['policy']:
      inputs.log_other_template(tokenizer, path, settings.data, log)
  return tokenizer


def load_network_configs(
  paths: dict[str, Path],
  runtime: Runtime,
  mesh: Mesh,
  log: LogFn,
  how: Mapping[str, RewardModelSettings],
) -> dict[str, LlamaConfig]:
  """Loads the network of each directory, for frozen models; `how` is that of reward models by name.

  Raises:
    UserError: a reward model has no scalar head; scores of a random head are meaningless.
  """
  configs = {}
  for name, path in paths.items():
    own, head, key = how.get(name, _AS_IT_IS), head_of(name), key_prefix(name)
    configs[name] = load_network_config(path, runtime, mesh, log, head=head, how=own, key=key)
    if head == 'scalar' and not reader.has_scalar_head(path, configs[name]):
      raise UserError(
        f'{key}path: {path} has no scalar head, so it is not a reward model; train one from it by '
        'the reward job, or set head=tokens if it answers by tokens.'
      )
  return configs


def head_of(name: str) -> str:
  """Returns the head of a frozen network by its name, such as reward or reward.NAME."""
  return HEADS[name.partition('.')[0]]


def load_models(
  models: Models, names: Sequence[str], weights: Weights, *, on_host: bool = False
) -> dict[str, Any]:
  """Loads the frozen parameters of the named models that exist.

  Args:
    on_host: the parameters are kept in host memory until they are used
      (config.runtime.frozen_params_memory).
  """
  trees = {}
  for name in names:
    if name not in models.frozen:
      continue  # rewards have other sources
    params = weights.frozen(*models.frozen[name], head_of(name))
    if on_host:
      # One model at a time moves to the host, so that the devices never hold all of them.
      params = host_memory.to_host(params)
      weights.forget()
    trees[name] = params
  return trees
