"""Attention with grouped queries; the implementation is chosen by name, the numbers are the same.

It knows nothing of projections, RoPE or caches: those are `llama` and `decode`.
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

_MASKED = -1e30  # finite, so that a fully masked row gives a mean and not NaN
_BLOCK = 512  # queries whose logits exist at once


def select_implementation(wanted: str, platform: str, dtype: str, head_dim: int) -> tuple[str, str]:
  """(implementation, why it is not the one wanted), for networks on devices of that platform.

  'auto' is splash on TPU, cudnn on CUDA in half precision, and xla elsewhere; the reason is '' for
  it, and wherever the wanted one can be had.
  """
  refused = {
    'xla': '',
    'splash': '' if platform == 'tpu' else f'it is for TPU, and the devices are {platform}',
    'cudnn': _refused_by_cudnn(platform, dtype, head_dim),
  }
  if wanted == 'auto':
    return next(name for name in ('splash', 'cudnn', 'xla') if not refused[name]), ''
  if not refused[wanted]:
    return wanted, ''
  return 'xla', f'attention={wanted}: {refused[wanted]}; using xla'


def _refused_by_cudnn(platform: str, dtype: str, head_dim: int) -> str:
  if platform not in ('gpu', 'cuda'):
    return f'it is for CUDA, and the devices are {platform}'
  if dtype not in ('bfloat16', 'float16'):
    return f'it computes in bfloat16 or float16, and config.runtime.compute_dtype={dtype}'
  if head_dim % 8 or head_dim > 128:
    return f'heads of {head_dim} are not a multiple of 8 up to 128'
  return ''


def attention(
  query: Float[Array, 'B S H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  implementation: str = 'xla',
  *,
  segment_ids: Int[Array, 'B S'] | None = None,
  layout: str = '',
) -> Float[Array, 'B S H h']:
  """Causal softmax(q kᵀ / √h) v, each key head serving H / K query heads; softmax in float32.

  Args:
    implementation: 'xla' anywhere; 'cudnn' (flash attention) on CUDA; 'splash' (a flash attention
      too) on TPU. Shapes that one of these cannot do are computed by xla, and a line says so.
    segment_ids: a token sees those before it, and itself, that have its own id. Tokens of id 0 see
      nothing and nobody sees them; what they find is 0. None is one segment per row: rows are
      padded on the right, so that no real token ever sees padding.
    layout: of the heads on the devices, a prefix in the table of `sharding`.
  """
  if implementation not in ATTENTION:
    raise UserError(f'attention={implementation!r} is not one of {ATTENTION}.')
  implementation = _possible(implementation, query.shape[1], segment_ids is not None)
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
  if implementation == 'splash':
    heads, tokens = f'{layout}heads', f'{layout}tokens'
    found = sharding.shard_map_activations(splash, (heads, heads, heads, tokens), heads)(
      query, key, value, segment_ids
    )
  else:
    found = _in_blocks(query, key, value, segment_ids)
  return found if segment_ids is None else jnp.where(segment_ids[:, :, None, None] > 0, found, 0)


def _possible(implementation: str, length: int, has_segments: bool) -> str:
  """The implementation, or xla where it cannot do rows of that length, or with segments."""
  if implementation == 'splash' and length % LANES:
    if length > LANES:
      _warn_once(f'splash attention wants rows of a multiple of {LANES} tokens; {length} go to xla')
    return 'xla'
  if implementation == 'cudnn' and has_segments:
    _warn_once('cudnn attention does not see where packed sequences end; packed rows go to xla')
    return 'xla'
  return implementation


@functools.cache
def _warn_once(what: str) -> None:
  """Says it once."""
  logging.warning(what)


def _in_blocks(query, key, value, segment_ids):
  """By XLA, block after block of queries, each against the keys up to its end.

  Half of the work of a square of logits, of which the backward pass makes a block at a time anew.
  """
  length = query.shape[1]
  if length <= _BLOCK:
    return _block(query, key, value, segment_ids)
  block = jax.checkpoint(_block)
  found = []
  for begin in range(0, length, _BLOCK):
    end = min(begin + _BLOCK, length)
    ids = None if segment_ids is None else segment_ids[:, :end]
    found.append(block(query[:, begin:end], key[:, :end], value[:, :end], ids))
  return jnp.concatenate(found, axis=1)


def _block(
  query: Float[Array, 'B Q H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  segment_ids: Int[Array, 'B S'] | None,
) -> Float[Array, 'B Q H h']:
  """The last Q of S queries."""
  batch, length, heads, size = query.shape
  kv_heads, begin = key.shape[2], key.shape[1] - length
  query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum('bqkgh,bskh->bkgqs', query, key, preferred_element_type=wide)
  position = jnp.arange(key.shape[1])
  mask = (position[begin:, None] >= position[None])[None]
  if segment_ids is not None:
    # Those of id 0 see each other, so that no row of the softmax is empty.
    mask = mask & (segment_ids[:, begin:, None] == segment_ids[:, None])
  logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum('bkgqs,bskh->bqkgh', weights, value).reshape(batch, length, heads, size)


class KeyValue(NamedTuple):
  """Keys [B, K, h, S] and values [B, K, S, h]: each as the product that reads it likes it."""

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
    main: what the row had when the chunk of steps began; of it the first `length` positions.
    recent: what was added since then, one position per step; of it positions 0 to `step`.
  """
  batch, heads, size = query.shape
  kv_heads, filled = main.key.shape[1], main.key.shape[-1]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query = (query * size**-0.5).reshape(batch, kv_heads, heads // kv_heads, size)

  def logits(cache, mask):
    found = jnp.einsum('bkgh,bkhs->bkgs', query, cache.key, preferred_element_type=wide)
    return jnp.where(mask[:, None, None], found, _MASKED)

  old = logits(main, jnp.arange(filled)[None] < length[:, None])
  new = logits(recent, jnp.arange(recent.key.shape[-1])[None] <= step)
  peak = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
  old, new = jnp.exp(old - peak), jnp.exp(new - peak)
  total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)

  def weighted(weights, cache):
    weights = (weights / total).astype(cache.value.dtype)
    return jnp.einsum('bkgs,bksh->bkgh', weights, cache.value)

  found = weighted(old, main) + weighted(new, recent)
  return found.reshape(batch, heads, size)
