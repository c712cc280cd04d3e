"""The networks of a PPO run that is planned, of the policy's sizes."""

import dataclasses

from jax.sharding import Mesh

from segjax.config.lora import resolve_lora
from segjax.config.reward_lines import reward_models
from segjax.config.settings import Segmentation, Settings
from segjax.model.llama import LlamaConfig
from segjax.run.models import apply_runtime
from segjax.train.recipe import RewardSource
from segjax.train.reward_spec import override
from segjax.train.segmenter import Segmenter

_ADAPTERS_OF = {'reward_lm': 'dpo'}  # in config.lora, where that is not the network's name


def networks(s: Settings, network: LlamaConfig, mesh: Mesh) -> dict[str, LlamaConfig]:
  """Returns the networks; those that reward have the adapters of `config.lora.reward` and `dpo`."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  configs = {'policy': trained, 'reference': frozen}
  if s.ppo.has_critic:
    configs['critic'] = trained
  if s.reward_shaping.reward_model_weight:
    configs['reward'] = frozen
  if s.reward_shaping.lm_reward.kind != 'off':
    configs['reward_lm'] = frozen
  configs |= {line.network: frozen for line in reward_models(s.rewards)}
  others = configs.keys() - {'reference'}
  return configs | {
    name: dataclasses.replace(configs[name], lora=resolve_lora(s, _adapters_of(name)))
    for name in others
  }


def _adapters_of(name: str) -> str:
  """Returns whose adapters in config.lora a network has; listed reward models, those of reward."""
  return _ADAPTERS_OF.get(name, name.partition('.')[0])


def listed_sources(s: Settings, configs: dict[str, LlamaConfig]) -> tuple[RewardSource, ...]:
  """Returns the reward models of config.rewards, cut as the first unless a line says otherwise."""
  return tuple(
    RewardSource(
      name=line.name,
      key=line.network,
      network=configs[line.network],
      segmenter=Segmenter(
        override(override(Segmentation(), s.reward_model.segmentation), line.segmentation)
      ),
      spread=line.spread or 'even_split',
      weight=line.weight,
    )
    for line in reward_models(s.rewards)
  )


def names_on_one_base(configs: dict[str, LlamaConfig]) -> tuple[str, ...]:
  """Returns the networks that add adapters to the reference, and itself; () if none does."""
  names = tuple(name for name, config in configs.items() if config.lora)
  return ('reference', *names) if names else ()
