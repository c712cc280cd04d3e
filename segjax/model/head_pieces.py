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
    weights: axes along which pieces of the kernel are gathered, in `dimension`.
  """

  mesh: AbstractMesh | None = None
  hidden: Any = (None, None, None)
  kernel: Any = (None, None)
  tokens: Any = (None, None)
  vocabulary: Axes = ()
  weights: Axes = ()
  dimension: int = 0

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
    return tuple(a for a in self._rows if a not in self.weights)

  @property
  def copies(self) -> int:
    """Number of devices that add the same gradient of a piece: those along no axis of the rows."""
    return self.size(tuple(a for a in self.weights if a not in self._rows))

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


def head_layout(hidden: Array, kernel: Array, tied: bool) -> HeadLayout:
  """Returns the layout of these arrays by the tables of `sharding`.

  Args:
    tied: whether the kernel is the embedding, transposed.
  """
  mesh = sharding.active_mesh()
  if mesh is None or mesh.size == 1:
    return HeadLayout()
  rule = sharding.ACTIVATION_RULES['hidden']
  of_hidden = sharding.fitted(rule, hidden.shape, mesh)
  spec = sharding.parameter_spec('backbone/embedding' if tied else 'lm_head/kernel')
  of_kernel = sharding.fitted(type(spec)(*reversed(spec)) if tied else spec, kernel.shape, mesh)
  width, columns = map(sharding.axes_of, of_kernel)
  # Along an axis that splits rows too, devices cannot share a product of all their tokens.
  vocabulary = tuple(a for a in columns if a not in sharding.axes_of(rule[0]))
  tokens = [tuple(a for a in sharding.axes_of(e) if a not in vocabulary) for e in of_hidden[:2]]
  return HeadLayout(
    mesh=mesh,
    hidden=of_hidden,
    kernel=of_kernel,
    tokens=type(spec)(*(axes or None for axes in tokens)),
    vocabulary=vocabulary,
    weights=tuple(a for a in (*width, *columns) if a not in vocabulary),
    dimension=0 if width else 1,
  )


class Pieces:
  """Reads the pieces of a device's part of the kernel, [D, columns of this device].

  The last piece ends where the part ends, so that it may overlap the one before it. What both have
  counts once.
  """

  def __init__(self, kernel: Array, layout: HeadLayout, config: LlamaConfig):
    self.kernel, self.layout = kernel, layout
    self.columns = kernel.shape[1]
    # Parts that are gathered along the vocabulary give a piece columns of each of them.
    self.parts = layout.size(layout.weights) if layout.dimension else 1
    self.count = -(-self.columns * self.parts // config.vocab_chunk)
    # Levelled, and aligned as the chunk is: 128 is the width of a register of TPUs.
    aligned = math.gcd(config.vocab_chunk, 128)
    self.width = min(self.columns, -(-self.columns // (self.count * aligned)) * aligned)

  def start(self, i: Array | int) -> Array | int:
    """Returns the first column of piece i in the device's part."""
    return jnp.minimum(i * self.width, self.columns - self.width) if self.count > 1 else 0

  def read(self, i: Array | int, dtype: Any) -> Float[Array, 'D piece']:
    """Returns piece i in `dtype`, gathered."""
    piece = jax.lax.dynamic_slice_in_dim(self.kernel, self.start(i), self.width, 1)
    return gathered(piece.astype(dtype), self.layout.weights, self.layout.dimension)

  def write(self, i: Array | int, whole: Array, piece: Float[Array, 'D piece']) -> Array:
    """Returns `whole`, like the device's part, with what devices have for piece i, added up."""
    piece = scattered(piece, self.layout.weights, self.layout.dimension)
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, self.start(i), 1)

  def ids(self, i: Array | int) -> Int[Array, '1 piece']:
    """Returns the entries of the vocabulary in piece i, -1 for those that piece i - 1 has too."""
    column, part = self.start(i) + jnp.arange(self.width), jnp.arange(self.parts)
    if self.layout.vocabulary:
      part += jax.lax.axis_index(self.layout.vocabulary) * self.parts
    ids = part[:, None] * self.columns + column[None]
    if self.count * self.width > self.columns:
      ids = jnp.where(column[None] >= i * self.width, ids, -1)
    return ids.reshape(1, -1)

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
