"""Attention to keys and values in pages, by several implementations that compute the same.

'triton' and 'ragged' are Pallas kernels that come with jax, for CUDA and TPU: they read the pages
up to the length of each row, and no others. 'xla' runs anywhere, and is what they are tested
against. Pages are those of `pages`; tables have indices l N + p into all layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from segjax.model import paged_kernels
from segjax.model.attention import attention
from segjax.model.pages import Pages, gather_view, page_size
from segjax.model.splash import LANES

_MASKED = -1e30  # finite: as in `attention`
_KEYS = 512  # positions of a prefix whose logits exist at once, see `_first_row`
_BLOCK_COUNTS = (0, 1, 2, 4)  # of `_KEYS`, for which there are programs


class PrefillRows(NamedTuple):
  """The rows whose tokens make up a chunk of a prefill: C tokens of up to R rows.

  A row's tokens are next to each other, rows are in order, and padding is at the end.

  Attributes:
    segment: [C], 1 + row of each token; 0 is padding.
    table: [R, M], pages of each row.
    length: [R], positions of each row in pages, those of the chunk included.
    start: [R + 1], tokens of the chunk before each row.
    count: [], rows that the chunk has.
  """

  segment: Int[Array, 'C']
  table: Int[Array, 'R M']
  length: Int[Array, 'R']
  start: Int[Array, 'R1']
  count: Int[Array, '']


def select_paged_attention(platform: str, dtype: str, head_dim: int) -> str:
  """Returns the implementation for a platform: its kernel in the sizes that it has, else 'xla'."""
  # Smaller heads are padded to 128 numbers, and their count to what the kernel takes. XLA for TPU
  # would read and write all pages of the pool in each chunk of prompts or steps, with temporaries
  # of 3 to 5 times their size.
  if platform == 'tpu' and head_dim <= LANES:
    return 'ragged'
  # Blocks of Triton have powers of two for sizes, and its products are of 16 numbers or more.
  is_block = head_dim >= 16 and head_dim.bit_count() == 1
  if platform in ('gpu', 'cuda') and dtype == 'bfloat16' and is_block:
    return 'triton'
  return 'xla'


def decode_attention(
  query: Float[Array, 'B H h'],
  pages: Pages,
  table: Int[Array, 'B M'],
  length: Int[Array, 'B'],
  implementation: str,
  *,
  kv_heads: int = 0,
  interpret: bool = False,
) -> Float[Array, 'B H h']:
  """Softmax(q kᵀ / √h) v of one token per row, over the first `length` positions of its pages.

  Args:
    length: at least 1.
    implementation: 'xla' anywhere, 'triton' on CUDA, 'ragged' on TPU.
    kv_heads: K; 0 for all that the pages have, which may be more for 'ragged'.
    interpret: whether to interpret the kernel of 'triton', on any platform, for tests.
  """
  if implementation == 'ragged':
    padded = _kernel_query(query, pages, kv_heads)
    return paged_kernels.ragged_decode(padded, pages, table, length)[:, : query.shape[1]]
  if implementation == 'triton':
    return paged_kernels.triton_decode(query, pages, table, length, interpret)
  view = gather_view(pages, table)
  batch, heads, size = query.shape
  query = (query * size**-0.5).reshape(batch, view.key.shape[1], -1, size)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum('bkgh,bkhs->bkgs', query, view.key, preferred_element_type=wide)
  mask = jnp.arange(view.key.shape[-1])[None] < length[:, None]
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, _MASKED), axis=-1)
  output = jnp.einsum('bkgs,bksh->bkgh', weights.astype(view.value.dtype), view.value)
  return output.reshape(batch, heads, size)


def prefill_attention(
  query: Float[Array, 'C H h'],
  key: Float[Array, 'C K h'],
  value: Float[Array, 'C K h'],
  pages: Pages,
  rows: PrefillRows,
  implementation: str,
  blocks: int | None = None,
) -> Float[Array, 'C H h']:
  """Causal softmax(q kᵀ / √h) v of a chunk of tokens, each over its own row up to itself.

  Only row 0 may have positions from before the chunk. Outputs of padding are 0.

  Args:
    key: of the tokens of the chunk.
    pages: with the keys and values of the chunk already written.
    implementation: as in `decode_attention`; 'triton' has no kernel for this and is as 'xla'.
    blocks: see `prefix_blocks`; 'ragged' reads by lengths and needs none.
  """
  if implementation == 'ragged':
    padded = _kernel_query(query, pages, key.shape[1])
    output = paged_kernels.ragged_prefill(padded, pages, *rows[1:])[:, : query.shape[1]]
    return jnp.where((rows.segment > 0)[:, None, None], output, 0)
  # Of a row that overflows, other rows in the chunk would see 0 times NaN. Its own next token reads
  # the pages, which keep what is not finite.
  key, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (key, value))
  inside = attention(query[None], key[None], value[None], segment_ids=rows.segment[None])[0]

  def with_prefix():
    first = _first_row(query, pages, rows.table[0], rows.length[0], prefix, blocks)
    # With `blocks` there may be no prefix here, but in another group of rows.
    return jnp.where(((rows.segment == 1) & (prefix > 0))[:, None, None], first, inside)

  prefix = rows.length[0] - rows.start[1]
  if blocks is None:
    return jax.lax.cond(prefix > 0, with_prefix, lambda: inside)
  return with_prefix() if blocks else inside


def _kernel_query(query: Float[Array, 'T H h'], pages: Pages, kv_heads: int):
  """Returns the queries with zeros for the heads that pages for 'ragged' have beyond `kv_heads`."""
  in_pages = pages.key.shape[2] // 2
  kv_heads = kv_heads or in_pages
  extra = query.shape[1] // kv_heads * (in_pages - kv_heads)
  return jnp.pad(query, ((0, 0), (0, extra), (0, 0)))


def block_counts(columns: int, page_size: int, implementation: str) -> tuple[int | None, ...]:
  """Returns the values of `prefix_blocks`, in order; each is a program.

  Args:
    columns: of the table of pages.
  """
  if implementation != 'triton':
    return (None,)
  most = -(-columns // _block_pages(columns, page_size))
  last = most if most <= _BLOCK_COUNTS[-1] else None
  return (*(n for n in _BLOCK_COUNTS if n < (last or most)), last)


def prefix_blocks(rows: PrefillRows, page_size: int, implementation: str) -> int | None:
  """Returns how many blocks of keys `prefill_attention` reads for the rows that have a prefix.

  A GPU is empty whenever the host waits for a condition of its program: in each layer once for the
  branch, and before each block. So the host, which knows the lengths, chooses the program.

  Args:
    rows: on the host, with groups of rows in front.

  Returns:
    0 where no row has a prefix; None where the program itself has to find out: for long prefixes,
    of which few blocks more than needed would cost as much as waiting, and where nothing waits.
  """
  columns = rows.table.shape[-1]
  length = np.where(rows.length[:, 0] > rows.start[:, 1], rows.length[:, 0], 0)
  needed = -(-int(length.max()) // (page_size * _block_pages(columns, page_size)))
  counts = block_counts(columns, page_size, implementation)
  return next(n for n in counts if n is None or n >= needed)


def _block_pages(columns: int, page_size: int) -> int:
  return min(max(_KEYS // page_size, 1), columns)


def _first_row(
  query: Float[Array, 'C H h'],
  pages: Pages,
  table: Int[Array, 'M'],
  length: Int[Array, ''],
  prefix: Int[Array, ''],
  blocks: int | None,
) -> Float[Array, 'C H h']:
  """Attention of tokens at positions prefix, prefix + 1, ... to one row, block after block of keys.

  Softmax over blocks as in flash attention, https://arxiv.org/abs/2205.14135: no array is as long
  as the row, and no block beyond its length is read. Outputs of tokens beyond it are arbitrary.
  """
  tokens, heads, size = query.shape
  kv_heads = pages.key.shape[0]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  # Batch dimensions first: XLA for CPU has no product of bfloat16 into float32 in another order.
  query = (query * size**-0.5).reshape(tokens, kv_heads, -1, size).transpose(1, 2, 0, 3)
  block_pages = _block_pages(table.shape[0], page_size(pages))
  block = block_pages * page_size(pages)
  # What another row has left in pages beyond the length need not be finite.
  is_read = page_size(pages) * jnp.arange(table.shape[0]) < length
  table = jnp.where(is_read, table, table[0])
  table = jnp.pad(table, (0, -table.shape[0] % block_pages))
  position = prefix + jnp.arange(tokens)

  def add_block(i, carry):
    peak, total, output = carry
    columns = jax.lax.dynamic_slice_in_dim(table, i * block_pages, block_pages)
    view = gather_view(pages, columns[None])
    logits = jnp.einsum('kgch,khs->kgcs', query, view.key[0], preferred_element_type=wide)
    mask = i * block + jnp.arange(block)[None] <= position[:, None]
    logits = jnp.where(mask[None, None], logits, _MASKED)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
    weights, scale = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
    added = jnp.einsum(
      'kgcs,ksh->kgch', weights.astype(view.value.dtype), view.value[0], preferred_element_type=wide
    )
    total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
    return new_peak, total, output * scale + added

  one = jnp.zeros((*query.shape[:-1], 1), wide)
  blocks = (length + block - 1) // block if blocks is None else blocks
  # Every token sees position 0, in the first block: no total is 0.
  start = (one + _MASKED, one, jnp.zeros(query.shape, wide))
  _, total, output = jax.lax.fori_loop(0, blocks, add_block, start)
  output = (output / total).astype(query.dtype)
  return output.transpose(2, 0, 1, 3).reshape(tokens, heads, size)
