"""The parts of a layer with parameters of their own: norms and matrix products, in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.settings import Lora
from segjax.model import lora, quantized


class RMSNorm(nn.Module):
  """x / √(mean(x²) + ε) · scale, in float32."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # float64 stays, for tests
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
    # One rounding, and the gradient of the scale, a sum over all tokens, adds up in float32.
    return (wide * jnp.broadcast_to(scale.astype(wide.dtype), x.shape)).astype(x.dtype)


class Linear(nn.Module):
  """x W (+ b) in x's dtype; the leading axes are flattened, which XLA on CPU runs faster.

  Where the collection of adapters has a pair for it, their product is added, see `lora`.
  """

  features: int
  use_bias: bool
  stddev: float
  adapter: Lora | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'B S _']) -> Float[Array, 'B S _']:
    kernel = self.param('kernel', nn.initializers.normal(self.stddev), (x.shape[-1], self.features))
    scale = self.get_variable('params', 'scale')  # None, except in a decode loop of int8 weights
    y = quantized.product(x.reshape(-1, x.shape[-1]), kernel, scale)
    y = y.reshape(*x.shape[:-1], self.features)
    if self.has_variable(lora.ADAPTER, 'a'):
      names = [name for name in ('a', 'b', 'own') if self.has_variable(lora.ADAPTER, name)]
      pair = {name: self.get_variable(lora.ADAPTER, name) for name in names}
      y = lora.adapted(x, y, pair, self.adapter.scale)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      # In float32 for the sake of the gradient, as in `RMSNorm`; the tests forbid rank promotion.
      wide = jnp.promote_types(y.dtype, jnp.float32)
      y = (y.astype(wide) + jnp.broadcast_to(bias.astype(wide), y.shape)).astype(x.dtype)
    return y
