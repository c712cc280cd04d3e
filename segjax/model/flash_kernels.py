"""The Pallas kernels of `flash`, each for one block of tokens of one head of one row.

A program keeps its own block of OWN tokens in registers and reads blocks of OTHER tokens, from the
first to the last that holds a token of one of its sequences on the right side of the diagonal. Of
blocks that it sees as a whole it computes no mask, which would take as long as the softmax. Softmax
and sums are in float32; exponentials are powers of 2, which is what a GPU computes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# The fastest of twelve choices on an H100, in packed rows and in one sequence of 8,192 tokens, with
# heads of 128 and of 64. Four warps are the group that Hopper's tensor cores work for, 64 rows.
# Loads overlap products in `num_stages`: a third costs the backward kernels, which hold more, up to
# half of their speed, and makes the forward one a tenth faster with heads of 128.
OWN = 64
OTHER = 64
FORWARD = triton.CompilerParams(num_warps=4, num_stages=3)
BACKWARD = triton.CompilerParams(num_warps=4, num_stages=2)

_LOG2E = math.log2(math.e)
_MASKED = -1e30  # a logit; finite, because the difference of two infinities is none
_START = -1e20  # the greatest logit before any key: above _MASKED, so that what is masked weighs 0


class _Tokens(NamedTuple):
  """A block of `count` tokens of a row of `length`; what lies beyond the row reads as 0."""

  row: jax.Array
  start: jax.Array
  count: int
  length: int

  @property
  def position(self):
    return self.start + jnp.arange(self.count, dtype=jnp.int32)

  def load(self, ref, head=None):
    """Returns their part of an array [B, S], or of one head of [B, H, S] or [B, S, H, h]."""
    ref, mask = self._part(ref, head)
    return triton.load(ref, mask=mask, other=None if mask is None else 0)

  def store(self, ref, head, x):
    """Writes their part of an array."""
    ref, mask = self._part(ref, head)
    triton.store(ref, x.astype(ref.dtype), mask=mask)

  def _part(self, ref, head):
    """Returns (their part of an array, which of them are in the row, or None for all)."""
    tokens = pl.ds(self.start, self.count)
    where = {2: (tokens,), 3: (head, tokens), 4: (tokens, head)}[len(ref.shape)]
    if not self.length % self.count:
      return ref.at[self.row, *where], None
    inside = self.position < self.length
    return ref.at[self.row, *where], inside[:, None] if len(ref.shape) == 4 else inside


def _own_tokens(length):
  """Returns the tokens of this program, its head and the number of its block.

  Heads and rows are the outer axes of the grid: programs that run at the same time read the keys of
  few heads, which the L2 cache then holds.
  """
  block, head, row = (pl.program_id(axis) for axis in range(3))
  return _Tokens(row, block * OWN, OWN, length), head, block


class _Blocks(NamedTuple):
  """The blocks from `first` to before `last`; of them, those that are seen as a whole."""

  first: jax.Array
  whole: jax.Array
  whole_end: jax.Array
  last: jax.Array

  def visit(self, add_block, carry, times=1):
    """Returns the carry after add_block(n, i, masked, carry) for block i, n from 0 to times - 1."""
    wholes = jnp.maximum(self.whole_end - self.whole, 0)
    others = jnp.maximum(self.last - self.first, 0) - wholes
    before = self.whole - self.first

    # One loop over times and blocks: loads of the next time overlap products of the last.
    def add_whole(i, carry):
      n = jax.lax.div(i, wholes) if times > 1 else 0
      return add_block(n, self.whole + i - n * wholes, False, carry)

    def add_other(i, carry):
      n = jax.lax.div(i, others) if times > 1 else 0
      i -= n * others
      return add_block(n, self.first + i + jnp.where(i < before, 0, wholes), True, carry)

    carry = jax.lax.fori_loop(0, times * wholes, add_whole, carry)
    return jax.lax.fori_loop(0, times * others, add_other, carry)


def _key_blocks(own, begin, whole):
  """Returns the blocks of keys that queries see."""
  end = jnp.minimum(own.start + own.count, own.length)
  first, last = jax.lax.div(begin, OTHER), jax.lax.div(end + OTHER - 1, OTHER)
  return _Blocks(first, jax.lax.div(whole + OTHER - 1, OTHER), jax.lax.div(own.start, OTHER), last)


def forward_kernel(*refs):
  """Computes the attention of a block of queries, block after block of keys.

  Args:
    refs: query, [B, S, H, h]; key and value, [B, S, K, h]; ids, [B, S]; begin, [B, N], the first
      key that each block of queries sees; whole, [B, N], the first of the keys before the block
      that all of its queries see; the output, as query; total, [B, H, S], log₂ of the sum of
      exponentials, for the backward pass.
  """
  query, key, value, ids, begin, whole, output, total = refs
  own, head, block = _own_tokens(query.shape[1])
  key_head, scale = jax.lax.div(head, query.shape[2] // key.shape[2]), query.shape[3] ** -0.5
  q, own_ids = own.load(query, head), own.load(ids)

  def add_block(_, i, masked, carry):
    summed, peak, weight = carry
    other = own._replace(start=i * OTHER, count=OTHER)
    k, v = other.load(key, key_head), other.load(value, key_head)
    logits = triton.dot(q, k.T)
    if masked:
      mask = own_ids[:, None] == other.load(ids)[None]
      mask &= own.position[:, None] >= other.position[None]
      logits = jnp.where(mask, logits, _MASKED)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * (scale * _LOG2E))
    weights = jnp.exp2(logits * (scale * _LOG2E) - new_peak[:, None])
    shrink = jnp.exp2(peak - new_peak)
    summed = summed * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
    return summed, new_peak, weight * shrink + jnp.sum(weights, axis=1)

  zeros, zero = jnp.zeros(q.shape, jnp.float32), jnp.zeros(OWN, jnp.float32)
  blocks = _key_blocks(own, begin[own.row, block], whole[own.row, block])
  summed, peak, weight = blocks.visit(add_block, (zeros, zero + _START, zero))
  # A query of id 0 sees padding, or nothing.
  is_real = own_ids > 0
  own.store(output, head, jnp.where(is_real[:, None], summed / weight[:, None], 0))
  # The weights of id 0 are 2^(-1e30) = 0 in the backward pass.
  own.store(total, head, jnp.where(is_real, peak + jnp.log2(weight), -_MASKED))


def query_kernel(*refs):
  """Computes the gradient of a block of queries, and Σ do · o of each, which `key_kernel` needs.

  Args:
    refs: query, key, value, ids, begin, whole, output, gradient of the output, total; the gradient
      of the query and the sums, [B, H, S]. Else as in `forward_kernel`.
  """
  query, key, value, ids, begin, whole, output, gradient, total, grad_query, delta = refs
  own, head, block = _own_tokens(query.shape[1])
  key_head, scale = jax.lax.div(head, query.shape[2] // key.shape[2]), query.shape[3] ** -0.5
  own_ids = own.load(ids)
  q, do, own_total = (own.load(ref, head) for ref in (query, gradient, total))
  own_delta = jnp.sum(own.load(output, head).astype(jnp.float32) * do.astype(jnp.float32), axis=1)
  own.store(delta, head, own_delta)

  def add_block(_, i, masked, summed):
    other = own._replace(start=i * OTHER, count=OTHER)
    k, v = other.load(key, key_head), other.load(value, key_head)
    logits = triton.dot(q, k.T) * (scale * _LOG2E) - own_total[:, None]
    if masked:
      mask = own_ids[:, None] == other.load(ids)[None]
      mask &= own.position[:, None] >= other.position[None]
      logits = jnp.where(mask, logits, _MASKED)
    weights = jnp.exp2(logits)
    grad_logits = weights * (triton.dot(do, v.T) - own_delta[:, None])
    return summed + triton.dot(grad_logits.astype(k.dtype), k)

  blocks = _key_blocks(own, begin[own.row, block], whole[own.row, block])
  summed = blocks.visit(add_block, jnp.zeros(q.shape, jnp.float32))
  own.store(grad_query, head, summed * scale)


def key_kernel(*refs):
  """Computes the gradients of a block of keys and values, summed over the heads that share them.

  Args:
    refs: query, key, value, ids; end, [B, N], 1 + the last query that sees each block of keys;
      whole, [B, N], 1 + the last of the queries after the block that see all of it; gradient of
      the output, total, delta; the gradients of key and value. Else as in the others.
  """
  query, key, value, ids, end, whole, gradient, total, delta, grad_key, grad_value = refs
  own, key_head, block = _own_tokens(query.shape[1])
  k, v, own_ids = own.load(key, key_head), own.load(value, key_head), own.load(ids)
  group, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
  blocks = _Blocks(
    jax.lax.div(own.start, OTHER),
    jax.lax.div(own.start + OWN, OTHER),
    jax.lax.div(whole[own.row, block], OTHER),
    jax.lax.div(end[own.row, block] + OTHER - 1, OTHER),
  )

  def add_block(n, i, masked, carry):
    summed_k, summed_v = carry
    other, head = own._replace(start=i * OTHER, count=OTHER), key_head * group + n
    q, do = other.load(query, head), other.load(gradient, head)
    # Transposed, [keys, queries]: the products of the weights then transpose nothing.
    logits = triton.dot(k, q.T) * (scale * _LOG2E) - other.load(total, head)[None]
    if masked:
      mask = own_ids[:, None] == other.load(ids)[None]
      mask &= own.position[:, None] <= other.position[None]
      logits = jnp.where(mask, logits, _MASKED)
    weights = jnp.exp2(logits)
    summed_v += triton.dot(weights.astype(do.dtype), do)
    grad_logits = weights * (triton.dot(v, do.T) - other.load(delta, head)[None])
    return summed_k + triton.dot(grad_logits.astype(q.dtype), q), summed_v

  zeros = jnp.zeros(k.shape, jnp.float32)
  summed_k, summed_v = blocks.visit(add_block, (zeros, zeros), times=group)
  own.store(grad_key, key_head, summed_k * scale)
  own.store(grad_value, key_head, summed_v)
