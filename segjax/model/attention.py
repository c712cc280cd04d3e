"""Causal attention with grouped queries, by several implementations that compute the same.

Not here: projections (`llama`), rotary embeddings (`rope`) and pages (`paged_attention`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from segjax.config.choices import ATTENTION
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.splash import LANES, splash

_MASKED = -1e30  # finite: a fully masked row then gives a mean instead of NaN
_BLOCK = 512  # queries whose logits exist at once, see `_in_blocks`
_CUDNN_SIZES = range(8, 129, 8)  # of heads
_FLASH_SIZES = (64, 128)  # of heads; larger ones need more registers than a GPU has


def select_implementation(
  requested: str, platform: str, dtype: str, head_dim: int
) -> tuple[str, str]:
  """Chooses an implementation for a platform: (name, why the requested one is not used).

  'auto' is splash on TPU, cudnn (and so flash in packed rows) on CUDA in half precision, and xla
  elsewhere. The reason is '' for 'auto' and for a requested implementation that is supported.
  """
  off_cuda = _refused_on_cuda(platform, dtype)
  size = f'head_dim={head_dim} is not'
  refused = {
    'xla': '',
    'splash': '' if platform == 'tpu' else f'it is for TPU, and the devices are {platform}',
    'cudnn': off_cuda or ('' if head_dim in _CUDNN_SIZES else f'{size} a multiple of 8 up to 128'),
    'flash': off_cuda or ('' if head_dim in _FLASH_SIZES else f'{size} one of {_FLASH_SIZES}'),
  }
  if requested == 'auto':
    return next(name for name in ('splash', 'cudnn', 'xla') if not refused[name]), ''
  if not refused[requested]:
    return requested, ''
  return 'xla', f'attention={requested}: {refused[requested]}; using xla'


def _refused_on_cuda(platform: str, dtype: str) -> str:
  if platform not in ('gpu', 'cuda'):
    return f'it is for CUDA, and the devices are {platform}'
  if dtype not in ('bfloat16', 'float16'):
    return f'it computes in bfloat16 or float16, and compute_dtype={dtype}'
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
    implementation: 'xla' anywhere; 'cudnn' and 'flash' on CUDA; 'splash' on TPU. All but the first
      are flash attention. cudnn has no packed rows and leaves them to flash. Unsupported shapes are
      computed by xla, which is logged once.
    segment_ids: a token attends to itself and to earlier tokens with its own id. Tokens of id 0
      attend to nothing and are attended by none; their output is 0. None is one segment per row:
      rows are padded on the right, so that no real token ever sees padding.

  What the backward pass needs to not run the forward pass again is named 'attention', for `remat`:
  named here and in the kernels, because it is the output as well as sums of the softmax.

  Raises:
    UserError: on an unknown implementation.
  """
  if implementation not in ATTENTION:
    raise UserError(f'attention={implementation!r} is unknown; use one of {ATTENTION}.')
  implementation = _supported(implementation, query.shape, segment_ids is not None)
  if implementation == 'cudnn':
    # No mask of padding: causality hides it, and jax would pass a mask on as a bias [S, S].
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
  if implementation == 'flash':
    # Imported here: Pallas takes half a second to import, and only CUDA needs it.
    from segjax.model.flash import flash

    return _on_each_device(flash)(query, key, value, segment_ids)
  if implementation == 'splash':
    output = _on_each_device(splash)(query, key, value, segment_ids)
  else:
    output = checkpoint_name(_in_blocks(query, key, value, segment_ids), 'attention')
  if segment_ids is None:
    return output
  # Implementations differ in their outputs for tokens of id 0.
  return jnp.where(segment_ids[:, :, None, None] > 0, output, 0)


def skips_other_segments(implementation: str, length: int, head_dim: int) -> bool:
  """Returns whether packed rows of `length` tokens cost what their sequences do.

  Otherwise they cost the square of their length: flash attention leaves out blocks in which no
  query and key belong together, xla does not.
  """
  return _supported(implementation, (1, length, 1, head_dim), has_segments=True) != 'xla'


def _on_each_device(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """Returns a Pallas kernel over rows and heads, which do not depend on each other, per device."""
  # XLA cannot partition it.
  return sharding.shard_map_activations(kernel, ('heads', 'heads', 'heads', 'tokens'), 'heads')


def _supported(implementation: str, shape: tuple[int, ...], has_segments: bool) -> str:
  """Returns the implementation that computes queries of a shape [B, S, H, h] when one is asked."""
  length, size = shape[1], shape[3]
  if implementation == 'splash' and length % LANES:
    if length > LANES:  # short prompts are common and cheap: not worth a warning
      _warn_once(f'splash attention needs a multiple of {LANES} tokens; rows of {length} use xla')
    return 'xla'
  if implementation == 'cudnn' and has_segments:
    if size in _FLASH_SIZES:
      return 'flash'
    _warn_once(
      f'neither cudnn nor flash attention supports packed rows with head_dim={size}; they use xla'
    )
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
