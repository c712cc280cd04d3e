"""Tokens and model FLOPs of a step, from the lengths of its sequences.

`report.metric_log` turns them into tokens per second and a share of the devices' peak.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.llama import LlamaConfig
from segjax.train.recipe import PPORecipe

# `report.metric_log` replaces these two metrics by rates.
TOKENS, FLOPS = 'perf/tokens', 'perf/flops'
EFFICIENCY = 'perf/packing_efficiency'


def ppo_step(
  recipe: PPORecipe, lengths: np.ndarray, *, policy_is_trained: bool
) -> dict[str, float]:
  """Returns the work of a PPO step: sampling, scoring by all networks, updates.

  Args:
    recipe: networks and number of epochs.
    lengths: tokens of prompt and response, [B].
    policy_is_trained: False while the critic warms up.
  """
  epochs = recipe.ppo.num_ppo_epochs
  passes = [
    _Passes(recipe.policy, 'language', 1 + recipe.recompute_logprob, epochs * policy_is_trained),
    _Passes(recipe.reference, 'language', 1),
  ]
  if recipe.critic is not None:
    passes.append(_Passes(recipe.critic, 'scalar', 1, epochs))
  if recipe.reward is not None:
    passes.append(_Passes(recipe.reward, 'scalar', 1))
  if recipe.reward_lm is not None:
    passes.append(_Passes(recipe.reward_lm, 'language', 1))
  passes += [_Passes(source.network, 'scalar', 1) for source in recipe.rewards]
  return _work(lengths, passes)


def update(
  lengths: np.ndarray, trained: LlamaConfig, head: str, frozen: LlamaConfig | None = None
) -> dict[str, float]:
  """Returns the work of one update, and of a forward pass of a frozen language model, if any."""
  passes = [_Passes(trained, head, updates=1)]
  if frozen is not None:
    passes.append(_Passes(frozen, 'language', 1))
  return _work(lengths, passes)


def add(*parts: dict[str, float]) -> dict[str, float]:
  """Returns the work of several updates together; their packing efficiency if each has one."""
  total = {name: sum(part[name] for part in parts) for name in (TOKENS, FLOPS)}
  if all(EFFICIENCY in part for part in parts):
    packed = sum(part[TOKENS] / part[EFFICIENCY] for part in parts)
    total[EFFICIENCY] = total[TOKENS] / packed
  return total


class _Passes(NamedTuple):
  """How often a network reads the tokens of a step: in forward passes, and in updates."""

  config: LlamaConfig
  head: str
  forward: int = 0
  updates: int = 0


def _work(lengths: np.ndarray, passes: Sequence[_Passes]) -> dict[str, float]:
  tokens = float(np.sum(lengths))
  pairs = sum(attended_pairs(int(length)) for length in lengths)
  flops = 0.0
  for config, head, forward, updates in passes:
    once = forward_flops(config, tokens, pairs, head)
    # A backward pass multiplies twice as much; of frozen matrices it needs no gradient.
    if config.lora is None:
      update = 3 * once
    else:
      update = 2 * once + forward_flops(config, 0, pairs, 'none')
      if config.lora.train_head and head == 'language':
        update += once - forward_flops(config, tokens, pairs, 'none')
    flops += forward * once + updates * update
  return {TOKENS: tokens, FLOPS: flops}
