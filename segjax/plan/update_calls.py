"""The shapes of packed updates: of the longest sequences, and of those of drawn lengths."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import PPO, SFT, RewardTraining
from segjax.plan import abstract_arrays
from segjax.plan.phases import Calls


def update_calls(
  arguments: Callable[[Any], tuple[Any, ...]],
  settings: SFT | RewardTraining | PPO,
  batches: Iterable[np.ndarray],
  longest: int,
  mesh: Mesh,
) -> tuple[tuple[Any, ...], tuple[Calls, ...]]:
  """Returns (arguments of an update of the longest sequences, calls of the updates of a step).

  Args:
    arguments: returns the arguments for the shapes of a PackingPlan, or for None without packing.
    settings: of the stage.
    batches: tokens of each sequence of each update, [N].
    longest: tokens of the longest sequence that there may be.
    mesh: the devices.
  """
  group = 2 if isinstance(settings, RewardTraining) else 1  # responses of a pair
  batches = list(batches)
  largest, _ = abstract_arrays.packing(settings, np.full_like(batches[0], longest), mesh, group)
  packings: dict[Any, Any] = {}
  pieces: dict[Any, list[int]] = {}
  for lengths in batches:
    packing, count = abstract_arrays.packing(settings, lengths, mesh, group)
    key = abstract_arrays.signature(packing)
    packings[key] = packing
    pieces.setdefault(key, []).append(count)
  of_largest = abstract_arrays.signature(largest)
  calls = tuple(
    Calls(
      len(counts),
      sum(counts) / len(counts),
      None if key == of_largest else arguments(packings[key]),
    )
    for key, counts in pieces.items()
  )
  return arguments(largest), calls
