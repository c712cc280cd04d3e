"""Tokens and model FLOPs of a step, from the lengths of its sequences.

`report.metric_log` turns them into tokens per second and a share of the devices' peak.
"""

from collections.abc import Sequence

import numpy as np

from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.llama import LlamaConfig
from segjax.train.recipe import PPORecipe

# `report.metric_log` replaces these two metrics by rates.
TOKENS, FLOPS = 'perf/tokens', 'perf/flops'

_FORWARD_AND_BACKWARD = 3  # cost in forward passes


def ppo_step(
  recipe: PPORecipe, lengths: np.ndarray, *, policy_is_trained: bool
) -> dict[str, float]:
  """Returns the work of a PPO step: sampling, scoring by all networks, updates.

  Args:
    recipe: networks and number of epochs.
    lengths: tokens of prompt and response, [B].
    policy_is_trained: False while the critic warms up.
  """
  updates = _FORWARD_AND_BACKWARD * recipe.ppo.num_ppo_epochs
  policy = 1 + recipe.recompute_logprob + updates * policy_is_trained
  passes = [
    (recipe.policy, 'language', policy),
    (recipe.reference, 'language', 1),
    (recipe.critic, 'scalar', 1 + updates),
  ]
  if recipe.reward is not None:
    passes.append((recipe.reward, 'scalar', 1))
  return _work(lengths, passes)


def update(
  lengths: np.ndarray, trained: LlamaConfig, head: str, frozen: LlamaConfig | None = None
) -> dict[str, float]:
  """Returns the work of one update, and of a forward pass of a frozen language model, if any."""
  passes = [(trained, head, _FORWARD_AND_BACKWARD)]
  if frozen is not None:
    passes.append((frozen, 'language', 1))
  return _work(lengths, passes)


def _work(lengths: np.ndarray, passes: Sequence[tuple[LlamaConfig, str, int]]) -> dict[str, float]:
  tokens = float(np.sum(lengths))
  pairs = sum(attended_pairs(int(length)) for length in lengths)
  flops = sum(times * forward_flops(config, tokens, pairs, head) for config, head, times in passes)
  return {TOKENS: tokens, FLOPS: flops}
