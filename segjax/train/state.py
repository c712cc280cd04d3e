"""What a training step carries from one call to the next."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Updates done, an integer scalar; parameters; the optimizer's state.

  jax rebuilds the tree with shapes, shardings and host arrays in place of the arrays, which a
  checked annotation of `step` would refuse.
  """

  step: Any
  params: Any
  opt_state: Any
