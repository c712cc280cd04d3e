"""Attention with grouped queries; the implementation is chosen by name, the numbers are the same.

It knows nothing of projections, RoPE or caches: those are `llama` and `decode`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ('xla', 'cudnn')

_MASKED = -1e30  # finite, so that a fully masked row gives a mean and not NaN


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
    implementation: 'xla' anywhere; 'cudnn' (flash attention) on CUDA in bfloat16 or float16.
    segment_ids: a token sees those before it, and itself, that have its own id. Tokens of id 0 see
      nothing and nobody sees them; what they find is 0. None is one segment per row: rows are
      padded on the right, so that no real token ever sees padding.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention={implementation!r} is not one of {IMPLEMENTATIONS}.')
  mask = _causal(query.shape[1])
  if segment_ids is not None:
    # Those of id 0 see each other, so that no row of the softmax is empty; what they find is
    # dropped.
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None])
  if implementation == 'cudnn':
    found = jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if segment_ids is None else mask[:, None],
      is_causal=segment_ids is None,
      implementation='cudnn',
    )
  else:
    found = _xla(query, key, value, mask)
  return found if segment_ids is None else jnp.where(segment_ids[:, :, None, None] > 0, found, 0)


def _xla(query, key, value, mask):
  batch, length, heads, size = query.shape
  kv_heads = key.shape[2]
  query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
  logits = jnp.einsum(
    'bqkgh,bskh->bkgqs',
    query,
    key,
    preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
  )
  logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum('bkgqs,bskh->bqkgh', weights, value).reshape(batch, length, heads, size)


def _causal(length: int) -> Bool[Array, '1 S S']:
  return jnp.tril(jnp.ones((1, length, length), bool))


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
