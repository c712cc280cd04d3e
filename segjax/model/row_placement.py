"""Puts the rows of a batch on the devices; each process makes only those of its own devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from segjax.model.mesh import check_batch
from segjax.model.sharding import batch_sharding


def place_rows(
  gather: Callable[[np.ndarray, Callable[[np.ndarray], jax.Array]], Any],
  rows: np.ndarray,
  mesh: Mesh,
) -> Any:
  """Returns the rows at indices as arrays of the mesh, split along their first axis.

  Args:
    gather: (indices, place) -> tree of place(x), where x are host arrays of the rows at these
      indices [B', ...]: `data.batches` gathers in this way.
    rows: indices of the rows of all processes, [B].
    mesh: the devices.

  Raises:
    UserError: B does not divide over the devices; the message names sizes that do.
  """
  count = len(rows)
  check_batch(f'a batch of {count} rows', count, mesh)
  parts = batch_sharding(1, mesh).addressable_devices_indices_map((count,)).values()
  local = np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

  def place(x: np.ndarray) -> jax.Array:
    def read(index):
      return x[np.searchsorted(local, np.arange(count)[index[0]])]

    shape = (count, *x.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(x.ndim, mesh), read)

  return gather(rows[local], place)
