"""Several sequences in a row of tokens, so that ragged batches waste no work on padding.

Only the network sees packed rows. What is read off it goes back to one row per sequence, and losses
know nothing of packing. Which sequences share a row is planned by `data.packing_plan`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from segjax.model import sharding
from segjax.model.llama import LlamaConfig
from segjax.types import PackingSlots


class PackedRows(NamedTuple):
  """Tokens of several sequences per row; the padding has segment id 0 and position 0."""

  ids: Int[Array, 'R W']
  positions: Int[Array, 'R W']
  segment_ids: Int[Array, 'R W']


def run_packed(
  function: Callable[..., Any],
  params: Any,
  ids: Int[Array, 'M S'],
  config: LlamaConfig,
  places: PackingSlots | None = None,
  segment_ids: Int[Array, 'M S'] | None = None,
) -> Any:
  """What a function of `heads` finds at each token, [M, S]; at padding the values are arbitrary.

  Args:
    places: packs the sequences for it; None leaves each in its row.
    segment_ids: of unpacked rows, see `heads`.
  """
  if places is None:
    return function(params, ids, config, segment_ids=segment_ids)
  packed = pack(ids, places)
  found = function(
    params, packed.ids, config, positions=packed.positions, segment_ids=packed.segment_ids
  )
  return jax.tree.map(lambda x: unpack(x, places, ids.shape[1]), found)


def pack(ids: Int[Array, 'M S'], places: PackingSlots) -> PackedRows:
  """The sequences at their places."""
  count, size = ids.shape
  total = places.rows * places.width
  position = jnp.arange(size)[None]
  target = (places.row * places.width + places.offset)[:, None] + position
  target = jnp.where(position < places.length[:, None], target, total)  # dropped
  # Of each packed token: which one it is, from 1 on; 0 for padding.
  source = (
    jnp.zeros(total, jnp.int32)
    .at[target]
    .set(1 + jnp.arange(count * size, dtype=jnp.int32).reshape(count, size), mode='drop')
  )
  index = jnp.maximum(source - 1, 0)
  rows = PackedRows(
    ids=jnp.where(source > 0, ids.reshape(-1)[index], 0),
    positions=jnp.where(source > 0, index % size, 0),
    segment_ids=jnp.where(source > 0, index // size + 1, 0),
  )
  shape = (places.rows, places.width)
  return PackedRows(*(sharding.constrain_batch(x.reshape(shape)) for x in rows))


def unpack(x: Shaped[Array, 'R W'], places: PackingSlots, size: int) -> Shaped[Array, 'M S']:
  """The first `size` entries of each sequence's place."""
  index = (places.row * places.width + places.offset)[:, None] + jnp.arange(size)[None]
  flat = sharding.constrain(x.reshape(-1), 'replicated')
  return sharding.constrain_batch(flat[jnp.minimum(index, len(flat) - 1)])
