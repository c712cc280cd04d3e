"""Sums and means over the real entries of an array.

Not here: what the masks mean. Whatever lies under a mask is ignored by `where`, never by
multiplication, so NaN there does no harm.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def at_least_float32(x: Float[Array, '...']) -> Float[Array, '...']:
  """Casts bfloat16 and float16 up to float32; float32 and float64 stay as they are."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(
  x: Float[Array, '*N'], mask: Bool[Array, '*N'], axis: int | tuple[int, ...] | None = None
) -> Float[Array, '...']:
  """Sum of the entries that are masked in, in at least float32; 0 where there are none."""
  return jnp.sum(jnp.where(mask, at_least_float32(x), 0), axis=axis)


def masked_mean(
  x: Float[Array, '*N'], mask: Bool[Array, '*N'], axis: int | tuple[int, ...] | None = None
) -> Float[Array, '...']:
  """Mean of the entries that are masked in, in at least float32; 0 where there are none.

  mean = Σ mask x / max(Σ mask, 1)

  Args:
    x: the values; those under the mask may be anything, NaN included.
    mask: True on the entries that count.
    axis: which axes to reduce; all of them by default.
  """
  return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def whiten(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """Shifts and scales the masked entries, all together, to mean 0 and variance 1.

  x ↦ (x − μ) / √max(σ², 1e-8), with μ and the population variance σ² over the whole batch. The
  floor keeps a batch of equal entries at 0. See Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    x: advantages.
    mask: True on the tokens that count.

  Returns:
    The whitened entries; 0 outside the mask.
  """
  centred = at_least_float32(x) - masked_mean(x, mask)
  variance = masked_mean(jnp.square(centred), mask)
  return jnp.where(mask, centred * jax.lax.rsqrt(jnp.maximum(variance, 1e-8)), 0)
