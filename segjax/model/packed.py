"""Several sequences in a row of tokens, so that ragged batches waste no work on padding.

Only the network sees packed rows. Its outputs go back to one row per sequence, and losses do not
depend on packing. `data.packing_plan` chooses which sequences share a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from segjax.model import sharding
from segjax.model.llama import LlamaConfig, RowLayout
from segjax.types import PackingSlots


def run_packed(
  function: Callable[..., Any],
  params: Any,
  ids: Int[Array, 'M S'],
  config: LlamaConfig,
  slots: PackingSlots | None = None,
  segment_ids: Int[Array, 'M S'] | None = None,
) -> Any:
  """Runs a function of `heads` on packed rows and unpacks what it returns, [M, S].

  Args:
    function: called with (params, ids, config, rows).
    slots: where each sequence goes; None leaves each in its own row.
    segment_ids: of unpacked rows, see `llama.RowLayout`; ignored with `slots`.

  Returns:
    The function's arrays, one row per sequence; values at padding are arbitrary.
  """
  if slots is None:
    return function(params, ids, config, RowLayout(segment_ids=segment_ids))
  packed, rows = pack(ids, slots)
  output = function(params, packed, config, rows)
  return jax.tree.map(lambda x: unpack(x, slots, ids.shape[1]), output)


def pack(ids: Int[Array, 'M S'], slots: PackingSlots) -> tuple[Int[Array, 'R W'], RowLayout]:
  """Returns the sequences in their slots; padding has id 0, position 0 and segment id 0."""
  count, size = ids.shape
  total = slots.rows * slots.width  # static: batches of other lengths compile nothing
  position = jnp.arange(size)[None]
  target = (slots.row * slots.width + slots.offset)[:, None] + position
  target = jnp.where(position < slots.length[:, None], target, total)  # past the end: dropped
  # Scattering indices once lets ids, positions and segment ids all be gathered. They count from 1,
  # so that 0 marks padding.
  source = (
    jnp.zeros(total, jnp.int32)
    .at[target]
    .set(1 + jnp.arange(count * size, dtype=jnp.int32).reshape(count, size), mode='drop')
  )
  index = jnp.maximum(source - 1, 0)  # padding gathers token 0, which `rows` replaces

  def rows(x):
    x = jnp.where(source > 0, x, 0)
    # Rows gather tokens from all devices: without this XLA may leave all rows on each.
    return sharding.constrain_batch(x.reshape(slots.rows, slots.width))

  return rows(ids.reshape(-1)[index]), RowLayout(rows(index % size), rows(index // size + 1))


def unpack(x: Shaped[Array, 'R W'], slots: PackingSlots, size: int) -> Shaped[Array, 'M S']:
  """Returns the first `size` entries of each slot; beyond the length they are arbitrary."""
  index = (slots.row * slots.width + slots.offset)[:, None] + jnp.arange(size)[None]
  # A sequence may leave its slot's device for that of its row in the batch: one number per token is
  # cheap to replicate.
  flat = sharding.constrain(x.reshape(-1), 'replicated')
  # Near the end of the last row a slot has fewer than `size` entries left.
  return sharding.constrain_batch(flat[jnp.minimum(index, len(flat) - 1)])
