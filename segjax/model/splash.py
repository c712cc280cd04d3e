"""Splash attention: flash attention for TPU, a Pallas kernel that comes with jax.

It runs on the rows and heads of one device, never writes the [S, S] logits, and skips the blocks
above the diagonal and those of other sequences. https://github.com/jax-ml/jax,
pallas/ops/tpu/splash_attention
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LANES = 128  # row lengths and blocks are multiples of it
_BLOCK = 512


def splash(
  query: Float[Array, 'B S H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  segment_ids: Int[Array, 'B S'] | None = None,
  *,
  interpret: bool = False,
) -> Float[Array, 'B S H h']:
  """Causal softmax(q kᵀ / √h) v; see `attention.attention`. Outputs of id 0 are arbitrary.

  Args:
    query: S a multiple of 128.
    interpret: whether to interpret the kernel, on any platform, for tests.
  """
  batch, length, heads, size = query.shape
  kv_heads = key.shape[2]
  kernel = _kernel(heads // kv_heads, length, interpret)
  # The kernel does not scale. Heads that share a key are its heads, so no key is repeated.
  query = (query * size**-0.5).reshape(batch, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  if segment_ids is None:
    output = jax.vmap(jax.vmap(kernel))(query, key, value)
  else:
    # Not vmap, which turns into a loop in each kernel: the tables of a kernel have no batch.
    output = jax.lax.map(lambda row: _packed_row(kernel, *row), (query, key, value, segment_ids))
  return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _kernel(heads: int, length: int, interpret: bool):
  # Imported here: Pallas takes half a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  mask = library.MultiHeadMask([library.CausalMask((length, length)) for _ in range(heads)])
  block = next(size for size in (_BLOCK, 2 * LANES, LANES) if not length % size)
  names = ('block_q', 'block_kv', 'block_kv_compute')
  backward = ('block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  return library.make_splash_mqa_single_device(
    mask,
    block_sizes=library.BlockSizes(**dict.fromkeys(names + backward, block)),
    # Its output and its sums: were one of them not saved, the kernel would run again.
    residual_checkpoint_name='attention',
    interpret=interpret,
  )


def _packed_row(kernel, query, key, value, ids):
  """Runs the kernel on a row, [K, G, S, h] and [K, S, h], without blocks of other sequences.

  The kernel skips what is 0 in its tables, and the library makes these of the causal mask alone.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  ids = ids.astype(jnp.int32)
  is_met = _met_blocks(ids, kernel.fwd_mask_info.block_mask.shape[-1])
  parts = kernel.fwd_mask_info, kernel.dq_mask_info
  kernel = type(kernel)(
    *(_without_blocks(part, is_met, by_key=False) for part in parts),
    _without_blocks(kernel.dkv_mask_info, is_met, by_key=True),
    **kernel.kwargs,
  )
  segments = library.SegmentIds(q=ids, kv=ids)
  return jax.vmap(kernel, (0, 0, 0, None))(query, key, value, segments)


def _met_blocks(ids: Int[Array, 'S'], count: int) -> Bool[Array, 'N N']:
  """Returns in which of N x N blocks of queries and keys a query may see a key, by their ids."""
  blocks = ids.reshape(count, -1)
  high = jnp.max(blocks, axis=1)
  low = jnp.min(jnp.where(blocks > 0, blocks, high[:, None]), axis=1)
  is_met = (low[:, None] <= high[None]) & (low[None] <= high[:, None]) & (high[None] > 0)
  # Padding alone sees itself: the kernel divides by the sum of what is seen.
  return jnp.tril(is_met) | jnp.eye(count, dtype=bool)


def _without_blocks(part: Any, is_met: Bool[Array, 'N N'], *, by_key: bool) -> Any:
  """Returns the part of a kernel's mask with fewer blocks.

  Args:
    part: a MaskInfo.
    is_met: blocks to keep.
    by_key: whether the kernel goes through the queries of each block of keys.
  """
  order = (is_met.T if by_key else is_met).reshape(-1)
  # What is fetched next is of the next block that is kept; the last one is on the diagonal.
  block = jnp.arange(order.size, dtype=jnp.int32)
  following = jax.lax.cummin(jnp.where(order, block, order.size - 1), reverse=True)
  following = jnp.remainder(following, is_met.shape[0]).reshape(is_met.shape)
  return part._replace(
    data_next=(following.T if by_key else following)[None].astype(part.data_next.dtype),
    block_mask=jnp.where(is_met[None], part.block_mask, 0).astype(part.block_mask.dtype),
  )
