"""The lookup of token embeddings, and how its gradient is added up.

Each device looks ids up in its own part of the vocabulary: what crosses devices is a row per token,
never the table or its gradient. The gradient of a frequent token is a sum of thousands of rows,
which bfloat16 would lose, so rows are cast after the lookup and gradients add up in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model import sharding


def embed(table: Float[Array, 'V D'], ids: Int[Array, 'B S'], dtype: Any) -> Float[Array, 'B S D']:
  """Returns the rows of the table at `ids` in `dtype`, laid out as 'hidden'."""
  mesh = sharding.active_mesh()
  if mesh is None or mesh.size == 1:
    return _rows(table, ids, dtype)
  table_spec = sharding.fitted(sharding.parameter_spec('backbone/embedding'), table.shape, mesh)
  hidden_spec = sharding.fitted(
    sharding.ACTIVATION_RULES['hidden'], (*ids.shape, table.shape[1]), mesh
  )
  vocabulary_axes = sharding.axes_of(table_spec[0])
  # Along the axes that split the vocabulary every device needs all tokens.
  kept = [tuple(a for a in sharding.axes_of(e) if a not in vocabulary_axes) for e in hidden_spec]
  ids_spec = type(hidden_spec)(*(axes or None for axes in kept[:2]))
  return jax.shard_map(
    functools.partial(_rows_of_shards, dtype=dtype, axes=vocabulary_axes, hidden=hidden_spec),
    mesh=mesh,
    in_specs=(table_spec, ids_spec),
    out_specs=hidden_spec,
  )(table, ids)


def _rows_of_shards(table, ids, *, dtype, axes, hidden):
  """Looks ids up in a device's part of the table and adds up what the devices have."""
  index = ids - (jax.lax.axis_index(axes) * len(table) if axes else 0)
  is_mine = (index >= 0) & (index < len(table))
  rows = _rows(table, jnp.where(is_mine, index, 0), dtype)
  rows = jnp.where(is_mine[..., None], rows, 0)
  # One device has the row and the others 0, so that these sums are exact in any dtype.
  for axis in axes:
    split = [n for n, entry in enumerate(hidden) if axis in sharding.axes_of(entry)]
    if split:
      rows = jax.lax.psum_scatter(rows, axis, scatter_dimension=split[0], tiled=True)
    else:
      rows = jax.lax.psum(rows, axis)
  return rows


def _rows(table, ids, dtype):
  # A bfloat16 table is widened first: its gradient is then rounded once, after the sum.
  return table.astype(jnp.promote_types(table.dtype, jnp.float32))[ids].astype(dtype)
