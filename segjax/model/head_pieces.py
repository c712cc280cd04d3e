"""Pieces of the head's kernel: how a device's part of the vocabulary is cut and gathered.

What is computed with a piece is in `fused_head`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int

from segjax.model import sharding
from segjax.model.llama import LlamaConfig

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HeadLayout:
  """How the arrays of the head are split over the axes of a mesh; on one device over none.

  Attributes:
    mesh: None without one.
    hidden: layout of the hidden states [B, S, D].
    kernel: layout of the kernel [D, V].
    tokens: layout of what has a number per token [B, S].
    vocabulary: axes that split the vocabulary; each of their devices needs all tokens of the group.
    width: axes along which pieces of the kernel are gathered; they split D.
  """

  mesh: AbstractMesh | None = None
  hidden: Any = (None, None, None)
  kernel: Any = (None, None)
  tokens: Any = (None, None)
  vocabulary: Axes = ()
  width: Axes = ()

  @property
  def positions(self) -> Axes:
    """Axes along which the positions of hidden states are gathered."""
    return tuple(a for a in sharding.axes_of(self.hidden[1]) if a in self.vocabulary)

  @property
  def replicated(self) -> Axes:
    """Axes of the vocabulary along which every device has all positions already."""
    return tuple(a for a in self.vocabulary if a not in self.positions)

  @property
  def summed(self) -> Axes:
    """Axes over which gradients of the kernel are still to be added when their piece is done."""
    return tuple(a for a in self._rows if a not in self.width)

  @property
  def copies(self) -> int:
    """Number of devices that add the same gradient of a piece: those along no axis of the rows."""
    return self.size(tuple(a for a in self.width if a not in self._rows))

  @property
  def _rows(self) -> Axes:
    return tuple(a for entry in self.tokens for a in sharding.axes_of(entry))

  def size(self, axes: Axes) -> int:
    """Number of devices along these axes together."""
    return math.prod(self.mesh.shape[a] for a in axes) if axes else 1

  def over_shards(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Returns `function` mapped over the devices' parts of its arguments."""
    if self.mesh is None:
      return function
    # check_vma=False: sums over axes are written out, in the backward pass too.
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def head_layout(hidden: Array, kernel: Array) -> HeadLayout:
  """Returns the layout of these arrays by the tables of `sharding`."""
  mesh = sharding.active_mesh()
  if mesh is None or mesh.size == 1:
    return HeadLayout()
  of_hidden = sharding.fitted(sharding.ACTIVATION_RULES['hidden'], hidden.shape, mesh)
  spec = sharding.parameter_spec('lm_head/kernel')  # of the embedding too, transposed
  of_kernel = sharding.fitted(spec, kernel.shape, mesh)
  width, vocabulary = map(sharding.axes_of, of_kernel)
  tokens = [tuple(a for a in sharding.axes_of(e) if a not in vocabulary) for e in of_hidden[:2]]
  return HeadLayout(
    mesh=mesh,
    hidden=of_hidden,
    kernel=of_kernel,
    tokens=type(spec)(*(axes or None for axes in tokens)),
    vocabulary=vocabulary,
    width=width,
  )


class Pieces:
  """Reads the pieces of a device's part of the kernel, each with a part of its columns.

  The last piece ends where the part ends, so that it may overlap the one before it. What both have
  counts once.
  """

  def __init__(self, kernel: Array, layout: HeadLayout, config: LlamaConfig):
    self.kernel, self.layout = kernel, layout
    self.columns = kernel.shape[1]
    self.count = -(-self.columns // config.vocab_chunk)
    # Levelled, and aligned as the chunk is: 128 is the width of a register of TPUs.
    aligned = math.gcd(config.vocab_chunk, 128)
    self.size = min(self.columns, -(-self.columns // (self.count * aligned)) * aligned)

  def start(self, i: Array | int) -> Array | int:
    """Returns the first column of piece i in the device's part."""
    return jnp.minimum(i * self.size, self.columns - self.size) if self.count > 1 else 0

  def read(self, i: Array | int, dtype: Any) -> Float[Array, 'D piece']:
    """Returns piece i in `dtype`, gathered."""
    piece = jax.lax.dynamic_slice_in_dim(self.kernel, self.start(i), self.size, 1)
    return gathered(piece.astype(dtype), self.layout.width, 0)

  def write(self, i: Array | int, whole: Array, piece: Float[Array, 'D piece']) -> Array:
    """Returns `whole`, like the device's part, with what devices have for piece i, added up."""
    piece = scattered(piece, self.layout.width, 0)
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, self.start(i), 1)

  def ids(self, i: Array | int) -> Int[Array, '1 piece']:
    """Returns the entries of the vocabulary in piece i, -1 for those that piece i - 1 has too."""
    column, first = self.start(i) + jnp.arange(self.size), 0
    if self.layout.vocabulary:
      first = jax.lax.axis_index(self.layout.vocabulary) * self.columns
    ids = first + column
    if self.count * self.size > self.columns:
      ids = jnp.where(column >= i * self.size, ids, -1)
    return ids[None]

  def loop(self, step: Callable[[Array | int, Any], Any], carry: Any) -> Any:
    """Returns the carry after step(i, carry) for all pieces.

    The last piece comes first: `write` of the one before it replaces what both have.
    """
    if self.count == 1:
      return step(0, carry)
    return jax.lax.fori_loop(0, self.count, lambda i, c: step(self.count - 1 - i, c), carry)


def gathered(x: Array, axes: Axes, dimension: int) -> Array:
  """Returns the parts of the devices along `axes`, joined."""
  return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def scattered(x: Array, axes: Axes, dimension: int) -> Array:
  """Adds x up over the devices along `axes` and returns this device's part along `dimension`."""
  if not axes:
    return x
  return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
