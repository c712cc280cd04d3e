"""The shapes of updates: of the largest pieces, and of those of drawn lengths."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from segjax.config.settings import PPO, SFT, PairTraining
from segjax.data.packing_plan import largest_packing
from segjax.model.flops import attended_pairs
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays
from segjax.plan.phases import Calls
from segjax.run.training_loop import piece_bound, plan_packing_for
from segjax.types import PackingPlan

# Keys that a query meets beside those it sees, because blocks are whole: counted over rows of 2,048
# and 4,096 tokens of UltraFeedback's lengths with the blocks of `model.splash` and `flash_kernels`.
_OTHERS = {'tpu': 730, 'gpu': 85}


def update_calls(
  arguments: Callable[[Any], tuple[Any, ...]],
  settings: SFT | PairTraining | PPO,
  batches: Int[np.ndarray, 'U N'],
  longest: int,
  mesh: Mesh,
  network: LlamaConfig,
  group: int = 0,
) -> tuple[tuple[Any, ...], Calls]:
  """Returns (arguments of the largest update, calls of the updates of a step).

  The largest has the longest sequences, or the largest pieces that micro_batch_tokens allows.
  Where the batches of a step have several shapes, those of another than most count by their tokens,
  padding included.

  Args:
    arguments: returns the arguments for the shapes of a PackingPlan, or for None without packing.
    settings: of the stage.
    batches: tokens of each sequence of each update.
    longest: tokens of the longest sequence that there may be.
    mesh: the devices.
    network: that is trained.
    group: sequences of a row; 0 for 2 of a pair and 1 of other rows, by the settings.
  """
  group = group or (2 if isinstance(settings, PairTraining) else 1)
  plan = functools.partial(plan_packing_for, settings, mesh=mesh, network=network, group=group)
  if settings.packing_length and settings.micro_batch_tokens:
    # Not that of the longest sequences, of which few fit into a piece exactly.
    largest = largest_packing(batches.shape[1], piece_bound(settings, mesh, network), group)
  else:
    largest, _ = plan(np.full_like(batches[0], longest))
  plans = [largest, *(plan(each)[0] for each in batches)]
  if largest is None:
    return arguments(None), Calls(len(batches))
  shapes = [abstract_arrays.on_all_devices(plan, mesh) for plan in plans]
  keys = [abstract_arrays.signature(each) for each in shapes]
  ((most, _),) = collections.Counter(keys[1:]).most_common(1)
  usual = keys.index(most, 1)
  alike = [plan for plan, key in zip(plans[1:], keys[1:], strict=True) if key == most]
  calls = Calls(
    number=sum(map(_tokens, plans[1:])) / float(np.mean([_tokens(plan) for plan in alike])),
    trips=round(np.mean([plan.num_pieces for plan in alike])),
    arguments=None if most == keys[0] else arguments(shapes[usual]),
    attended=attended_share(alike, mesh),
  )
  return arguments(shapes[0]), calls


def _tokens(plan: PackingPlan) -> int:
  """Returns the tokens of the pieces in use, padding included."""
  return plan.num_pieces * plan.pieces.rows * plan.pieces.width


def attended_share(plans: Sequence[PackingPlan], mesh: Mesh) -> float:
  """Returns the share of the pairs of positions in packed rows that the attention computes."""
  length = np.concatenate([plan.pieces.length.reshape(-1) for plan in plans])
  others = _OTHERS['tpu' if mesh.devices.flat[0].platform == 'tpu' else 'gpu']
  pairs = sum(attended_pairs(int(n)) + n * others for n in length)
  return min(float(pairs) / sum(map(_tokens, plans)) / plans[0].pieces.width, 0.5)
