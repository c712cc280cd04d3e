"""What a training step carries from one call to the next."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Updates done, parameters, and the optimizer's state."""

  step: Int[Array, '']
  params: Any
  opt_state: Any
