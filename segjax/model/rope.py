"""Rotary position embeddings (RoPE), with the scalings of Llama-3.1 and of linear interpolation.

See Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How RoPE frequencies are stretched for contexts longer than those trained on.

  kind 'linear' divides every frequency by `factor`; 'llama3' divides the low ones, keeps the high
  ones and blends between (Llama-3.1). The other fields belong to 'llama3'.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, '_']:
  """Angle per position of each pair of channels, [head_dim / 2], radians.

  f_i = θ^(-2i / head_dim). With 'llama3' scaling by s, original length N, wavelength λ = 2π / f:
  f / s where λ > N / low, f where λ < N / high, and between them the blend
  (1 - b) f / s + b f with b = (N / λ - low) / (high - low).

  Raises:
    UserError: the kind of scaling is unknown.
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  frequency = theta**-exponent
  if scaling is None:
    return frequency.astype(np.float32)
  if scaling.kind == 'linear':
    return (frequency / scaling.factor).astype(np.float32)
  if scaling.kind != 'llama3':
    raise UserError(f'rope type {scaling.kind!r} is not one of default, linear, llama3.')
  periods = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
  blend = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  blend = np.clip(blend, 0.0, 1.0)
  return ((1 - blend) * frequency / scaling.factor + blend * frequency).astype(np.float32)


def rotate(
  x: Float[Array, 'B S H h'], positions: Int[Array, 'B S'], frequency: Float[np.ndarray, '_']
) -> Float[Array, 'B S H h']:
  """Applies rotary position embeddings; channel i is paired with channel i + h / 2, as in HF.

  Angles, sines and products are in at least float32: bfloat16 cannot count past 256 positions.
  """
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]  # [B, S, 1, h / 2]
  first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
