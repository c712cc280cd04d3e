"""Rows of a rollout: prompt and response as one sequence, and its part that is the response."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.model import sharding
from segjax.types import Rollout


def concat_prompt_response(rollout: Rollout) -> Int[Array, 'B S']:
  """Returns prompt and response as one sequence padded on the right, S = P + T."""
  return _concat(rollout.prompt_ids, rollout.response_ids, rollout.prompt_length)


def attention_segment_ids(rollout: Rollout) -> Int[Array, 'B S'] | None:
  """Returns 1 for the tokens of `concat_prompt_response` that attention sees, else 0.

  None where attention sees all tokens.
  """
  if rollout.attended is None:
    return None
  prompt = jnp.ones(rollout.prompt_ids.shape, jnp.int32)
  return _concat(prompt, rollout.attended.astype(jnp.int32), rollout.prompt_length)


def carried_mask(rollout: Rollout) -> Bool[Array, 'B T']:
  """Returns True on the tokens that earlier policies drew; `rollout.carried` must not be None."""
  return jnp.arange(rollout.response_mask.shape[1])[None] < rollout.carried[:, None]


def _concat(prompt: Array, response: Array, prompt_length: Int[Array, 'B']) -> Array:
  size = prompt.shape[1]
  both = jnp.concatenate([prompt, response], axis=1)
  position = jnp.arange(both.shape[1])[None]
  length = prompt_length[:, None]
  # The response follows the prompt's last real token, so the prompt's padding moves to the end.
  source = jnp.where(position < length, position, position - length + size)
  # Positions past the response read its padding; no mask includes them.
  return jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1)


def gather_response(
  x: Float[Array, 'B S'], prompt_length: Int[Array, 'B'], size: int
) -> Float[Array, 'B T']:
  """Returns the `size` entries of each row from its response's first on.

  Indices past the end of a row read its last entry.
  """
  index = prompt_length[:, None] + jnp.arange(size)[None]
  return jnp.take_along_axis(x, jnp.minimum(index, x.shape[1] - 1), axis=1)


@jax.jit
def take_rows(tree: Any, rows: Int[Array, 'N']) -> Any:
  """Returns these rows of every array in the tree, split over the devices."""
  # Without the constraint, indexing by traced rows may leave all rows on every device.
  return jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), tree)


@jax.jit
def concatenate(chunks: list[Any]) -> Any:
  """Joins chunks of a batch along B; the result stays split over the devices."""
  return jax.tree.map(
    lambda *parts: sharding.constrain_batch(jnp.concatenate(parts, axis=0)), *chunks
  )
