"""The lookup of token embeddings, and how its gradient is added up.

Each device looks ids up in its own part of the table: what crosses devices are the hidden states of
a device's tokens, never the table or its gradient. The gradient of a frequent token is a sum of
thousands of rows, which bfloat16 would lose, so rows are cast after the lookup and gradients add up
in float32.
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
  vocabulary = sharding.axes_of(table_spec[0])
  # Devices along an axis that does not split the rows have nothing to exchange their columns for.
  width = tuple(a for a in sharding.axes_of(table_spec[1]) if a in sharding.axes_of(hidden_spec[0]))
  # Along the axes that split the vocabulary every device needs all tokens.
  ids_axes = [tuple(a for a in sharding.axes_of(e) if a not in vocabulary) for e in hidden_spec]
  spec = type(hidden_spec)
  return jax.shard_map(
    functools.partial(
      _rows_of_shards, dtype=dtype, vocabulary=vocabulary, width=width, hidden=hidden_spec
    ),
    mesh=mesh,
    in_specs=(spec(vocabulary or None, width or None), spec(*(a or None for a in ids_axes[:2]))),
    out_specs=hidden_spec,
  )(table, ids)


def _rows_of_shards(table, ids, *, dtype, vocabulary, width, hidden):
  """Looks ids up in a device's part of the table and exchanges what the devices have."""
  if width:
    # Of the ids of all devices that have other columns of the table; the ids are small.
    ids = jax.lax.all_gather(ids, width, axis=0, tiled=True)
  index = ids - (jax.lax.axis_index(vocabulary) * len(table) if vocabulary else 0)
  is_mine = (index >= 0) & (index < len(table))
  rows = _rows(table, jnp.where(is_mine, index, 0), dtype)
  rows = jnp.where(is_mine[..., None], rows, 0)
  # One device has the row and the others 0, so that these sums are exact in any dtype.
  for axis in vocabulary:
    split = [n for n, entry in enumerate(hidden) if axis in sharding.axes_of(entry)]
    if split:
      rows = jax.lax.psum_scatter(rows, axis, scatter_dimension=split[0], tiled=True)
    else:
      rows = jax.lax.psum(rows, axis)
  if width:
    # Columns of the rows of all against all columns of a device's own rows.
    rows = jax.lax.all_to_all(rows, width, split_axis=0, concat_axis=2, tiled=True)
  return rows


def _rows(table, ids, dtype):
  # A bfloat16 table is widened first: its gradient is then rounded once, after the sum.
  return table.astype(jnp.promote_types(table.dtype, jnp.float32))[ids].astype(dtype)
