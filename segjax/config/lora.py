"""Which networks are trained by adapters, and at which learning rates."""

import dataclasses

from segjax.config.choices import OPTIMIZERS
from segjax.config.field_checks import check_choice
from segjax.config.settings import Lora, Settings, replace
from segjax.config.training_settings import ALL_LINEAR, LORA_TARGETS
from segjax.errors import UserError

# The network of each optimizer: of the jobs sft and reward, and the two of PPO.
_NETWORKS = dict(zip(OPTIMIZERS, ('sft', 'reward', 'policy', 'critic'), strict=True))


def resolve_lora(s: Settings, network: str) -> Lora | None:
  """Returns the adapter of a network of `LoraSettings`, None if all of it is trained.

  The targets are matrices in the order of `LORA_TARGETS`.
  """
  fields = {field.name: getattr(s.lora, field.name) for field in dataclasses.fields(Lora)}
  own = {k: value for k, value in vars(getattr(s.lora, network)).items() if value is not None}
  lora = Lora(**fields | {name: own[name] for name in own if name in fields})
  if not lora.rank:
    return None
  everything = ALL_LINEAR in lora.targets
  targets = tuple(name for name in LORA_TARGETS if everything or name in lora.targets)
  return dataclasses.replace(lora, targets=targets)


def with_adapter_rates(s: Settings) -> Settings:
  """Returns the settings with the learning rates of networks that have adapters.

  Gradients of A and B are small beside those of the weights that they stand for.
  """
  rates = {}
  for optimizer, network in _NETWORKS.items():
    if resolve_lora(s, network):
      section, _, name = optimizer.partition('.')
      rate = getattr(getattr(s, section), name).learning_rate
      own = getattr(s.lora, network).learning_rate_factor
      factor = s.lora.learning_rate_factor if own is None else own
      rates[f'{optimizer}.learning_rate'] = rate * factor
  return replace(s, **rates)


def check_lora(s: Settings) -> None:
  """Raises UserError if an adapter has no matrix, or one that no layer has."""
  for network in _NETWORKS.values():
    own = getattr(s.lora, network)
    key = 'config.lora' if own.targets is None else f'config.lora.{network}'
    targets = s.lora.targets if own.targets is None else own.targets
    for name in targets:
      check_choice(f'{key}.targets', name, (ALL_LINEAR, *LORA_TARGETS))
    rank = s.lora.rank if own.rank is None else own.rank
    if rank and not targets:
      raise UserError(
        f'{key}.targets is empty, but the {network} has adapters of rank {rank}; name matrices out '
        f'of {",".join(LORA_TARGETS)}, or all-linear, or set the rank to 0 to train all weights.'
      )
  on_host = s.runtime.frozen_params_memory == 'host'
  if on_host and any(resolve_lora(s, network) for network in ('policy', 'critic')):
    raise UserError(
      'config.runtime.frozen_params_memory=host cannot be had with adapters, whose base updates '
      'and rollouts read too; set it to device.'
    )
