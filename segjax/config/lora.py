"""Which networks are trained by adapters, and at which learning rates."""

import dataclasses
from operator import attrgetter
from typing import Any

from segjax.config.choices import OPTIMIZERS
from segjax.config.field_checks import check_choice
from segjax.config.settings import Lora, Settings, replace
from segjax.config.training_settings import ALL_LINEAR, FUSED_TARGETS, LORA_TARGETS
from segjax.errors import UserError

# The network of each optimizer: of the jobs sft, reward and dpo, and the two of PPO.
_NETWORKS = dict(zip(OPTIMIZERS, ('sft', 'reward', 'dpo', 'policy', 'critic'), strict=True))


def resolve_lora(s: Settings, network: str) -> Lora | None:
  """Returns the adapter of a network of `LoraSettings`, None if all of it is trained.

  The targets are matrices in the order of `LORA_TARGETS`.
  """
  values = _values(s, network)
  del values['learning_rate_factor']
  lora = Lora(**values)
  if not lora.rank:
    return None
  everything = ALL_LINEAR in lora.targets
  targets = tuple(name for name in LORA_TARGETS if everything or name in lora.targets)
  return dataclasses.replace(lora, targets=targets)


def _values(s: Settings, network: str) -> dict[str, Any]:
  """Returns the settings of a network: its own where they are set, else those of all.

  One with a scalar head has no train_head.
  """
  own = vars(getattr(s.lora, network))
  return {name: getattr(s.lora, name) if own[name] is None else own[name] for name in own}


def with_adapter_rates(s: Settings) -> Settings:
  """Returns the settings with the learning rates of networks that have adapters.

  Gradients of A and B are small beside those of the weights that they stand for.
  """
  rates = {}
  for optimizer, network in _NETWORKS.items():
    if resolve_lora(s, network):
      key = f'{optimizer}.learning_rate'
      rates[key] = attrgetter(key)(s) * _values(s, network)['learning_rate_factor']
  return replace(s, **rates)


def check_fits(lora: Lora | None, family: str, tied: bool) -> None:
  """Raises UserError if adapters are of what a network does not have.

  Args:
    lora: of the network.
    family: of the network.
    tied: whether its embedding is its head to the vocabulary.
  """
  for fused, parts in FUSED_TARGETS.items() if lora and family == 'phi3' else ():
    missing = [name for name in parts if name not in lora.targets]
    if 0 < len(missing) < len(parts):
      raise UserError(
        f'config.lora.targets={",".join(lora.targets)} lacks {",".join(missing)} of {fused}, one '
        f'matrix in checkpoints of family phi3; name all of {",".join(parts)}, or none.'
      )
  if lora and lora.train_head and tied:
    raise UserError(
      'config.lora.train_head=True, but the embedding of this network is its head, as '
      'tie_word_embeddings says, and stays frozen beside adapters; set it to False, or train all '
      'weights by config.lora.rank=0.'
    )


def check_lora(s: Settings) -> None:
  """Raises UserError if an adapter has no matrix, or one that no layer has, or no head to train."""
  for network in _NETWORKS.values():
    values, is_own = _values(s, network), getattr(s.lora, network).targets is not None
    key = f'config.lora.{network}' if is_own else 'config.lora'
    for name in values['targets']:
      check_choice(f'{key}.targets', name, (ALL_LINEAR, *LORA_TARGETS))
    if values['rank'] and not values['targets']:
      raise UserError(
        f'{key}.targets is empty, but the {network} has adapters of rank {values["rank"]}; name '
        f'matrices out of {",".join(LORA_TARGETS)}, or all-linear, or set the rank to 0 to train '
        'all weights.'
      )
    check_fits(resolve_lora(s, network), s.network.family, s.network.tie_word_embeddings)
  on_host = s.runtime.frozen_params_memory == 'host'
  if on_host and any(resolve_lora(s, network) for network in ('policy', 'critic')):
    raise UserError(
      'config.runtime.frozen_params_memory=host cannot be had with adapters, whose base updates '
      'and rollouts read too; set it to device.'
    )
