"""Weights rounded to int8, one scale per output channel, for the products of a decode loop.

A decode step reads every weight once for few tokens: half the bytes is nearly half the time. Not
for training: what is rounded here is a copy of the policy.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int8

from segjax.model import sharding

MAX = 127  # of int8; -128 is left out, so that both signs have the same steps

# The matrices of the layers. Not the embedding, whose rows are looked up, nor the head, where an
# error moves a logit directly; norms and biases are small.
_MATRICES = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')


def quantize(kernel: Float[Array, '*L I O']) -> tuple[Int8[Array, '*L I O'], Float[Array, '*L O']]:
  """Rounds a kernel to (q, scale), such that kernel ≈ q · scale.

  scale_o = max_i |W_io| / 127 in float32, q_io = round(W_io / scale_o). So |W_io − q_io scale_o| is
  at most scale_o / 2. A column of zeros has scale 0; one that is not finite has a scale that is
  not, as its products are not.
  """
  wide = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=-2) / MAX
  steps = wide / jnp.where(scale == 0, 1, scale)[..., None, :]
  return jnp.round(steps).astype(jnp.int8), scale


def product(
  x: Float[Array, 'N I'],
  kernel: Float[Array, 'I O'] | Int8[Array, 'I O'],
  scale: Float[Array, 'O'] | None = None,
) -> Float[Array, 'N O']:
  """Returns x · kernel, or (x · q) scale of an int8 kernel with a scale, in x's dtype.

  Factors are in x's dtype, in which every int8 is exact, and matrix units add in float32. The scale
  is applied in at least float32.
  """
  # Cast where it is used: the stored weights, which the optimizer updates, may be wider. Compilers
  # for accelerators convert an int8 kernel inside the product: no wide copy of it is written.
  y = x @ kernel.astype(x.dtype)
  if scale is None:
    return y
  wide = jnp.promote_types(y.dtype, jnp.float32)
  # Not a float32 product: where devices add their parts of it, they would exchange twice the bytes.
  return (y.astype(wide) * jnp.broadcast_to(scale.astype(wide), y.shape)).astype(x.dtype)


def quantize_layers(params: Any) -> Any:
  """Returns the parameters of a network with the matrices of its layers in int8.

  Each int8 'kernel' [L, in, out] has a 'scale' [L, out] beside it, as `layers.Linear` reads it.
  """
  layers = dict(params['backbone']['layers'])
  for name in _MATRICES:
    stored = layers[name]['kernel']
    rounded = dict(zip(('kernel', 'scale'), quantize(stored), strict=True))
    mesh = jax.typeof(stored).sharding.mesh
    if not mesh.empty:
      # Left where the stored weights lie: else the partitioner would first move those, which are
      # larger, to where the rounded ones are needed.
      for leaf, x in rounded.items():
        spec = sharding.parameter_spec(f'layers/{name}/{leaf}')
        layout = NamedSharding(mesh, sharding.fitted(spec, x.shape, mesh))
        rounded[leaf] = jax.lax.with_sharding_constraint(x, layout)
    layers[name] = {**layers[name], **rounded}
  return {**params, 'backbone': {**params['backbone'], 'layers': layers}}
