"""Causal attention with grouped queries, by several implementations that compute the same.

Not here: projections (`llama`), rotary embeddings (`rope`) and pages (`paged_attention`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int

from segjax.config.choices import ATTENTION
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.splash import LANES, splash

_MASKED = -1e30  # finite: a fully masked row then gives a mean instead of NaN
_BLOCK = 512  # queries whose logits exist at once, see `_in_blocks`


def select_implementation(
  requested: str, platform: str, dtype: str, head_dim: int
) -> tuple[str, str]:
  """Chooses an implementation for a platform: (name, why the requested one is not used).

  'auto' is splash on TPU, cudnn on CUDA in half precision, and xla elsewhere. The reason is '' for
  'auto' and for a requested implementation that is supported.
  """
  refused = {
    'xla': '',
    'splash': '' if platform == 'tpu' else f'it is for TPU, and the devices are {platform}',
    'cudnn': _refused_by_cudnn(platform, dtype, head_dim),
  }
  if requested == 'auto':
    return next(name for name in ('splash', 'cudnn', 'xla') if not refused[name]), ''
  if not refused[requested]:
    return requested, ''
  return 'xla', f'attention={requested}: {refused[requested]}; using xla'


def _refused_by_cudnn(platform: str, dtype: str, head_dim: int) -> str:
  if platform not in ('gpu', 'cuda'):
    return f'it is for CUDA, and the devices are {platform}'
  if dtype not in ('bfloat16', 'float16'):
    return f'it computes in bfloat16 or float16, and compute_dtype={dtype}'
  if head_dim % 8 or head_dim > 128:
    return f'head_dim={head_dim} is not a multiple of 8 up to 128'
  return ''


def attention(
  query: Float[Array, 'B S H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  implementation: str = 'xla',
  *,
  segment_ids: Int[Array, 'B S'] | None = None,
) -> Float[Array, 'B S H h']:
  """Causal softmax(q kᵀ / √h) v, each key head serving H / K query heads; softmax in float32.

  Args:
    implementation: 'xla' anywhere; 'cudnn' (flash attention) on CUDA; 'splash' (a flash attention
      too) on TPU. Unsupported shapes are computed by xla, which is logged once.
    segment_ids: a token attends to itself and to earlier tokens with its own id. Tokens of id 0
      attend to nothing and are attended by none; their output is 0. None is one segment per row:
      rows are padded on the right, so that no real token ever sees padding.

  Raises:
    UserError: on an unknown implementation.
  """
  if implementation not in ATTENTION:
    raise UserError(f'attention={implementation!r} is unknown; use one of {ATTENTION}.')
  implementation = _supported(implementation, query.shape[1], segment_ids is not None)
  if implementation == 'cudnn':
    # No mask of padding: causality hides it, and jax would pass a mask on as a bias [S, S].
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
  if implementation == 'splash':
    # A Pallas kernel cannot be partitioned by XLA; rows and heads do not depend on each other.
    output = sharding.shard_map_activations(splash, ('heads', 'heads', 'heads', 'tokens'), 'heads')(
      query, key, value, segment_ids
    )
  else:
    output = _in_blocks(query, key, value, segment_ids)
  if segment_ids is None:
    return output
  # Implementations differ in their outputs for tokens of id 0.
  return jnp.where(segment_ids[:, :, None, None] > 0, output, 0)


def _supported(implementation: str, length: int, has_segments: bool) -> str:
  """Returns the implementation, or xla if it does not support that length, or segments."""
  if implementation == 'splash' and length % LANES:
    if length > LANES:  # short prompts are common and cheap: not worth a warning
      _warn_once(f'splash attention needs a multiple of {LANES} tokens; rows of {length} use xla')
    return 'xla'
  if implementation == 'cudnn' and has_segments:
    _warn_once('cudnn attention does not support packed sequences; packed rows use xla')
    return 'xla'
  return implementation


@functools.cache
def _warn_once(message: str) -> None:
  """Logs each message once per process: tracing would repeat it for every program."""
  logging.warning(message)


def _in_blocks(query, key, value, segment_ids):
  """Attention by XLA, block after block of queries, each against the keys up to its end.

  This does half of the work of a square of logits.
  """
  length = query.shape[1]
  if length <= _BLOCK:
    return _block(query, key, value, segment_ids)
  # Recomputed in the backward pass, so that the logits of one block exist at a time there too.
  block = jax.checkpoint(_block)
  outputs = []
  # Not a scan: each block sees another number of keys, and a scan has one shape.
  for begin in range(0, length, _BLOCK):
    end = min(begin + _BLOCK, length)
    ids = None if segment_ids is None else segment_ids[:, :end]
    outputs.append(block(query[:, begin:end], key[:, :end], value[:, :end], ids))
  return jnp.concatenate(outputs, axis=1)


def _block(
  query: Float[Array, 'B Q H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  segment_ids: Int[Array, 'B S'] | None,
) -> Float[Array, 'B Q H h']:
  """Attention of the last Q of S tokens to all S."""
  batch, length, heads, size = query.shape
  kv_heads, begin = key.shape[2], key.shape[1] - length
  # Grouped by key head, so that no key is repeated. Scaled here, where there are fewer numbers than
  # in the logits.
  query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  # In float32: rounding to bfloat16 moves a logit of 20 by up to 0.06, and its exp by 6 %.
  logits = jnp.einsum('bqkgh,bskh->bkgqs', query, key, preferred_element_type=wide)
  position = jnp.arange(key.shape[1])
  mask = (position[begin:, None] >= position[None])[None]
  if segment_ids is not None:
    # Tokens of id 0 see each other here, so that no row of the softmax is empty.
    mask = mask & (segment_ids[:, begin:, None] == segment_ids[:, None])
  logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum('bkgqs,bskh->bqkgh', weights, value).reshape(batch, length, heads, size)


class KeyValue(NamedTuple):
  """Keys [B, K, h, S] and values [B, K, S, h], each laid out for the einsum that consumes it."""

  key: Float[Array, 'B K h S']
  value: Float[Array, 'B K S h']


def cached_attention(
  query: Float[Array, 'B H h'],
  main: KeyValue,
  recent: KeyValue,
  length: Int[Array, 'B'],
  step: Int[Array, ''],
) -> Float[Array, 'B H h']:
  """Attention of one token per row to a cache in two parts, one softmax over both, in float32.

  Args:
    query: one token per row.
    main: keys and values from before the chunk of steps; the first `length` positions count.
    recent: keys and values of the chunk, one position per step; positions 0 to `step` count.
    length: filled positions of `main`.
    step: of the chunk, from 0.
  """
  batch, heads, size = query.shape
  kv_heads, filled = main.key.shape[1], main.key.shape[-1]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  # Grouped by key head: the cache is never repeated, and read once for all queries of a group.
  query = (query * size**-0.5).reshape(batch, kv_heads, heads // kv_heads, size)

  def logits(query, cache, mask):
    scores = jnp.einsum('bkgh,bkhs->bkgs', query, cache.key, preferred_element_type=wide)
    return jnp.where(mask[:, None, None], scores, _MASKED)

  old = logits(query, main, jnp.arange(filled)[None] < length[:, None])
  # XLA joins products that share an operand: on GPUs it would concatenate the keys of both parts.
  apart = jax.lax.optimization_barrier(query)
  new = logits(apart, recent, jnp.arange(recent.key.shape[-1])[None] <= step)
  # The two parts are never concatenated: that would copy the main one in every step.
  peak = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
  old, new = jnp.exp(old - peak), jnp.exp(new - peak)
  # At least 1, from the peak; in free slots too, since `recent` holds the token itself.
  total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)

  def weighted(weights, cache):
    # Normalised in float32, before the cast.
    weights = (weights / total).astype(cache.value.dtype)
    return jnp.einsum('bkgs,bksh->bkgh', weights, cache.value)

  output = weighted(old, main) + weighted(new, recent)
  return output.reshape(batch, heads, size)
