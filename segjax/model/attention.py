"""Attention with grouped queries; the implementation is chosen by name, the numbers are the same.

It knows nothing of projections, RoPE or caches: those are `llama` and `decode`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

IMPLEMENTATIONS = ('xla', 'cudnn')

_MASKED = -1e30  # finite, so that a fully masked row gives a mean and not NaN


def attention(
  query: Float[Array, 'B Q H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  mask: Bool[Array, 'B Q S'] | None = None,
  implementation: str = 'xla',
  *,
  attended: Bool[Array, 'B S'] | None = None,
) -> Float[Array, 'B Q H h']:
  """softmax(q kᵀ / √h) v, each key head serving H / K query heads; softmax in float32.

  Args:
    mask: True where a query may look; None is causal (Q == S, rows padded on the right, so that
      no real token ever sees padding).
    implementation: 'xla' anywhere; 'cudnn' (flash attention) on CUDA in bfloat16 or float16.
    attended: False on the tokens (Q == S) that no other token sees and whose own output is 0, as
      un-padded flash attention leaves them; None is all True.
  """
  if attended is not None:
    mask = _causal(query.shape[1]) if mask is None else mask
    # The others see each other, so that no row of the softmax is empty; what they find is dropped.
    mask = mask & (attended[:, :, None] == attended[:, None])
    found = attention(query, key, value, mask, implementation)
    return jnp.where(attended[:, :, None, None], found, 0)
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if mask is None else mask[:, None],
      is_causal=mask is None,
      implementation='cudnn',
    )
  if implementation != 'xla':
    raise ValueError(f'attention={implementation!r} is not one of {IMPLEMENTATIONS}.')
  batch, length, heads, size = query.shape
  kv_heads = key.shape[2]
  query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
  logits = jnp.einsum(
    'bqkgh,bskh->bkgqs',
    query,
    key,
    preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
  )
  if mask is None:
    mask = _causal(length)
  logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum('bkgqs,bskh->bqkgh', weights, value).reshape(batch, length, heads, size)


def _causal(length: int) -> Bool[Array, '1 S S']:
  return jnp.tril(jnp.ones((1, length, length), bool))
