"""Splash attention: flash attention for TPU, a Pallas kernel that comes with jax.

It runs on the rows and heads of one device, never writes the [S, S] logits, and skips the blocks
above the diagonal. https://github.com/jax-ml/jax, pallas/ops/tpu/splash_attention
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    ids = _segment_ids(segment_ids)
    output = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(query, key, value, ids)
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


def _segment_ids(ids: Int[Array, 'B S']):
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  ids = ids.astype(jnp.int32)
  return library.SegmentIds(q=ids, kv=ids)
