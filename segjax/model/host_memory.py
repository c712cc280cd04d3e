"""Parameters that wait in the memory of the host while no program uses them."""

from typing import Any

import jax

from segjax.errors import UserError

_HOST = 'pinned_host'


def to_host(tree: Any) -> Any:
  """Moves arrays to pinned memory of the host, with the same sharding.

  Raises:
    UserError: the devices cannot read the host's memory.
  """
  device = next(iter(jax.tree.leaves(tree)[0].devices()))
  if _HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(
      f'frozen_params_memory=host: {device.device_kind} devices cannot read memory of the host; '
      'use device.'
    )
  return _in_memory(tree, _HOST)


def to_device(tree: Any) -> Any:
  """Moves arrays from `to_host` back to the devices; arrays already there are not copied."""
  return _in_memory(tree, 'device')


def _in_memory(tree: Any, kind: str) -> Any:
  return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))
