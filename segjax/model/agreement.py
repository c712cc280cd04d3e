"""Flags that all processes agree on, without waiting for each other on the host.

Each process puts its flags on its own devices; a program of all devices joins them, and the result
is read with something that is read anyway. In a run of one process nothing is put on a device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from segjax import processes
from segjax.model import sharding
from segjax.model.mesh import over_all_devices


def place_flags(flags: bool | tuple[bool, ...], mesh: Mesh) -> Bool[Array, 'N ...'] | None:
  """Puts this process's flags on each of its devices, N of all processes.

  Returns:
    None in a run of one process.
  """
  if processes.process_count() == 1:
    return None
  own = np.array(flags)[None]
  return jax.make_array_from_callback(
    (mesh.size, *own.shape[1:]), over_all_devices(mesh), lambda _: own
  )


class StepAgreement:
  """Joins the flags of all processes after each step.

  Those of a step are read after the next one, when the devices have computed them long since: until
  then the host would wait for all of the step.
  """

  def __init__(self, mesh: Mesh):
    self._mesh, self._pending = mesh, None

  def __call__(self, *flags: bool) -> tuple[bool, ...]:
    """Accepts the flags of a step; every process calls it after each step.

    Returns:
      Which flags any process had: of the step before, at first none; in a run of one process its
      own of this step.
    """
    placed = place_flags(flags, self._mesh)
    if placed is None:
      return flags
    before, self._pending = self._pending, _join(self._mesh)(placed)
    if before is None:
      return (False,) * len(flags)
    return tuple(map(bool, processes.to_host(before)))


@functools.cache
def _join(mesh: Mesh):
  join = functools.partial(jnp.any, axis=0)
  return jax.jit(join, out_shardings=sharding.replicated(mesh))
