"""Flash attention in packed rows for CUDA: Pallas kernels, one forward and two backward.

They visit the blocks of keys (or queries) that the sequences of a block reach, and no others, so
that a row costs the sum of the squares of its sequences and not its own square. No [S, S] array
exists, and no key is repeated. FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from segjax.model import flash_kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash(
  query: Float[Array, 'B S H h'],
  key: Float[Array, 'B S K h'],
  value: Float[Array, 'B S K h'],
  segment_ids: Int[Array, 'B S'] | None = None,
  interpret: bool = False,
) -> Float[Array, 'B S H h']:
  """Causal softmax(q kᵀ / √h) v; see `attention.attention`. Outputs of id 0 are 0.

  Args:
    query: h a power of two, at least 16.
    segment_ids: should not fall along a row. A block of tokens reads those with ids from its least
      to its greatest, so that other orders give the same and take longer.
    interpret: whether to interpret the kernels, on any platform, for tests.
  """
  return _forward(query, key, value, segment_ids, interpret)[0]


def _forward(query, key, value, segment_ids, interpret):
  """Returns outputs [B, S, H, h] and log₂ of the sums of exponentials [B, H, S]."""
  batch, length, heads, _ = query.shape
  ids = _ids(query, segment_ids)
  total = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
  run = _call(flash_kernels.forward_kernel, 'flash_forward', (query, total), interpret)
  return run(query, key, value, ids, *_reach(ids)[0])


def _save_forward(query, key, value, segment_ids, interpret):
  output, total = _forward(query, key, value, segment_ids, interpret)
  # Both are named: were one of them not saved, the backward pass would run the kernel again.
  output, total = (checkpoint_name(x, 'attention') for x in (output, total))
  return output, (query, key, value, segment_ids, output, total)


def _backward(interpret, residuals, gradient):
  """Returns the gradients of query, key, value and segment ids, of which there is none."""
  query, key, value, segment_ids, output, total = residuals
  ids = _ids(query, segment_ids)
  before, after = _reach(ids)
  run = _call(flash_kernels.query_kernel, 'flash_dq', (query, total), interpret)
  grad_query, delta = run(query, key, value, ids, *before, output, gradient, total)
  # A program for all queries of a key head: their sum takes no memory and no atomics.
  run = _call(flash_kernels.key_kernel, 'flash_dkv', (key, value), interpret)
  grad_key, grad_value = run(query, key, value, ids, *after, gradient, total, delta)
  return grad_query, grad_key, grad_value, None


flash.defvjp(_save_forward, _backward)


def _ids(query, segment_ids):
  if segment_ids is None:
    return jnp.ones(query.shape[:2], jnp.int32)
  return segment_ids.astype(jnp.int32)


def _reach(ids: Int[Array, 'B S']) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """Returns which tokens a program's block sees, and which see it: two pairs [B, N], [B, N].

  Before the block: the first token that shares a sequence with it; and the first from which on all
  are of one sequence with all of it. After it: 1 + the last such tokens. A block of id 0 alone
  reaches nothing. Computed here, because a kernel would have to search.
  """
  length, own = ids.shape[1], flash_kernels.OWN
  blocks = jnp.pad(ids, ((0, 0), (0, -length % own))).reshape(ids.shape[0], -1, own)
  high = jnp.max(blocks, axis=-1, keepdims=True)
  low = jnp.min(jnp.where(blocks > 0, blocks, high), axis=-1, keepdims=True)
  tokens = ids[:, None]
  is_reached = (tokens >= low) & (tokens <= high) & (tokens > 0)
  position = jnp.arange(length, dtype=jnp.int32)[None, None]
  begin = jnp.min(jnp.where(is_reached, position, length), axis=-1)
  end = jnp.max(jnp.where(is_reached, position + 1, 0), axis=-1)
  is_one = jnp.all((blocks == high) & (blocks > 0), axis=-1)
  is_one &= jnp.sum(is_reached, axis=-1) == end - begin
  start = own * jnp.arange(blocks.shape[1], dtype=jnp.int32)[None]
  return (begin, jnp.where(is_one, begin, start)), (end, jnp.where(is_one, end, start + own))


def _call(kernel, name, outputs, interpret) -> Callable[..., tuple[Array, Array]]:
  """Returns the call of a kernel whose outputs are like these, [B, S, heads, h] the first."""
  is_forward = kernel is flash_kernels.forward_kernel
  batch, length, heads, _ = outputs[0].shape
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(length, flash_kernels.OWN), heads, batch),
    out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
    compiler_params=flash_kernels.FORWARD if is_forward else flash_kernels.BACKWARD,
    interpret=interpret,
    name=name,
  )
