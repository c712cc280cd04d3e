"""Tokens and model FLOPs of a step, from the lengths of its sequences.

What share of the devices' peak that is, `report.metric_log` knows.
"""

import numpy as np

from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.llama import LlamaConfig
from segjax.report.metric_log import FLOPS, TOKENS
from segjax.train.experience import PPORecipe

_TRAINED = 3  # forward passes that a forward and a backward pass are worth


def ppo_step(recipe: PPORecipe, lengths: np.ndarray) -> dict[str, float]:
  """Of a rollout [B] of prompts with responses: sampled, scored by all networks, trained on."""
  updates = _TRAINED * recipe.ppo.num_ppo_epochs
  passes = [
    (recipe.policy, 'language', 1 + updates),
    (recipe.reference, 'language', 1),
    (recipe.critic, 'scalar', 1 + updates),
  ]
  if recipe.reward is not None:
    passes.append((recipe.reward, 'scalar', 1))
  return _work(lengths, passes)


def update(
  lengths: np.ndarray, trained: LlamaConfig, head: str, frozen: LlamaConfig | None = None
) -> dict[str, float]:
  """Of an update on sequences of these lengths, with a forward pass of a frozen policy, if any."""
  passes = [(trained, head, _TRAINED)]
  if frozen is not None:
    passes.append((frozen, 'language', 1))
  return _work(lengths, passes)


def _work(lengths: np.ndarray, passes: list[tuple[LlamaConfig, str, int]]) -> dict[str, float]:
  tokens = float(np.sum(lengths))
  pairs = sum(attended_pairs(int(length)) for length in lengths)
  flops = sum(times * forward_flops(config, tokens, pairs, head) for config, head, times in passes)
  return {TOKENS: tokens, FLOPS: flops}
