"""Checksums of arrays, computed on the devices; they do not depend on how arrays are sharded."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from segjax import processes
from segjax.train.optimizer import TrainState

Checksum = UInt[Array, '']


def checksums(states: dict[str, Any]) -> dict[str, int]:
  """Returns a checksum of the parameters of each training state, by name."""
  return {k: int(v) for k, v in processes.to_host(_jitted(_params(states))).items()}


def item_checksums(items: dict[str, Any]) -> dict[str, Checksum]:
  """Returns Σ_leaf 31^leaf · Σ bits modulo 2³² of each item."""
  # Integer sums are exact in any order; a sum of floats would change with the mesh.
  return {name: _over_leaves(item, _bits) for name, item in items.items()}


_jitted = jax.jit(item_checksums)


def weight_hashes(states: dict[str, Any]) -> dict[str, Checksum]:
  """Returns the hash of the parameters of each training state as the metric `weights/NAME`.

  Σ_leaf 31^leaf · Σ_i (2 i + 1) bits_i modulo 2³², i the index in the flat leaf: unlike a plain sum
  it changes when two numbers trade places. Stays on the devices: nothing waits for it.
  """
  return {f'weights/{name}': value for name, value in _hashes(_params(states)).items()}


@jax.jit
def _hashes(items: dict[str, Any]) -> dict[str, Checksum]:
  return {name: _over_leaves(item, _weighted_bits) for name, item in items.items()}


def _params(states: dict[str, Any]) -> dict[str, Any]:
  return {name: state.params for name, state in states.items() if isinstance(state, TrainState)}


def _over_leaves(item: Any, integers: Any) -> Checksum:
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(item):
    # By 31, so that two leaves in exchanged places give another sum.
    total = total * jnp.uint32(31) + jnp.sum(integers(leaf), dtype=jnp.uint32)
  return total


def _weighted_bits(x: Array) -> Array:
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    # From iotas along the axes, which are as sharded as x; a flat index would gather it.
    stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
    index = index + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
  return _bits(x).astype(jnp.uint32) * (jnp.uint32(2) * index + jnp.uint32(1))


def _bits(x: Array) -> Array:
  """Returns the bits of every number, as unsigned integers of the same size."""
  if x.dtype == bool:
    return x.astype(jnp.uint32)  # a bool cannot be bitcast
  size = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)  # 8 bytes: two uint32
  return jax.lax.bitcast_convert_type(x, size)
