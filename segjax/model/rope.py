"""Rotary position embeddings (RoPE), with scalings for contexts longer than those trained on.

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
  ones and blends between (Llama-3.1); 'longrope' divides each by one of its own (Ding et al. 2024,
  https://arxiv.org/abs/2402.13753). The other fields belong to the last two.

  Attributes:
    factor: of the context's length.
    short_factor: of 'longrope', by pair of channels, for sequences of up to the original length.
    long_factor: the same for longer ones, which are not computed here: transformers changes the
      factors of all tokens when a sequence grows past that length, and with a cache those of the
      later ones alone.
    attention_factor: of 'longrope', by which rotated queries and keys are multiplied.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  attention_factor: float = 1.0


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, '_']:
  """Angle per position of each pair of channels, [head_dim / 2], radians.

  f_i = θ^(-2i / head_dim). With 'llama3' scaling by s, original length N, wavelength λ = 2π / f:
  f / s where λ > N / low, f where λ < N / high, and between them the blend
  (1 - b) f / s + b f with b = (N / λ - low) / (high - low). With 'longrope', f_i / short_factor_i.

  In float32, operation by operation as in Meta's and transformers' code, with which the weights
  were trained: float64 gives angles that differ by 0.001 at position 16,384.

  Raises:
    UserError: the kind of scaling is unknown.
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  # The correctly rounded power: float32 routines of platforms differ from it and from each other in
  # the last bit of one channel in a hundred.
  power = np.float64(np.float32(theta)) ** exponent.astype(np.float64)
  frequency = 1 / power.astype(np.float32)
  if scaling is None:
    return frequency
  if scaling.kind == 'longrope':
    return 1 / (np.asarray(scaling.short_factor, np.float32) * power.astype(np.float32))
  if scaling.kind == 'linear':
    return frequency / np.float32(scaling.factor)
  if scaling.kind != 'llama3':
    raise UserError(f'rope type {scaling.kind!r} is not one of default, linear, llama3, longrope.')
  # Numbers of Python are rounded to float32 where they meet an array, in torch as in numpy.
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  original = scaling.original_max_position_embeddings
  # torch divides a number by an array as number * (1 / array).
  wavelength = 2 * math.pi * (1 / frequency)
  blend = (original * (1 / wavelength) - low) / (high - low)
  blended = (1 - blend) * frequency / scaling.factor + blend * frequency
  stretched = np.where(wavelength > original / low, frequency / scaling.factor, blended)
  return np.where(wavelength < original / high, frequency, stretched)


def rotate(
  x: Float[Array, 'B S H h'],
  positions: Int[Array, 'B S'],
  frequency: Float[np.ndarray, '_'],
  factor: float = 1.0,
) -> Float[Array, 'B S H h']:
  """Applies rotary position embeddings; channel i is paired with channel i + h / 2, as in HF.

  `factor` multiplies the result, see `RopeScaling.attention_factor`. Angles, sines and products are
  in at least float32: bfloat16 cannot count past 256 positions.
  """
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]  # [B, S, 1, h / 2]
  if factor != 1:
    cos, sin = cos * factor, sin * factor
  first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
