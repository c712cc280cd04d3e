"""Attention to keys and values in pages, by several implementations that compute the same.

'triton' and 'ragged' are Pallas kernels that come with jax, for CUDA and TPU: they read the pages
up to the length of each row, and no others. 'xla' runs anywhere, and is what they are tested
against. https://github.com/jax-ml/jax, pallas/ops/gpu/paged_attention.py and
pallas/ops/tpu/ragged_paged_attention.

Pages are those of `pages`; tables have indices l N + p into all layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model.attention import attention
from segjax.model.pages import Pages, gather_view, page_size
from segjax.model.splash import LANES

_MASKED = -1e30  # finite: as in `attention`
_PROGRAMS = 1024  # that keep a GPU busy: 8 for each of an H100's 132 processors
_KEYS = 512  # positions of a prefix whose logits exist at once, see `_first_row`
_BLOCK_PAGES = 16  # at most: each needs scalar registers of the TPU, which has 32
_VMEM = 64 * 2**20  # bytes of a TPU's vector memory that the kernel may use
_SMEM = 2**19  # bytes of a TPU's scalar memory, 1 MiB, that a table may take


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


def select_paged_attention(platform: str, dtype: str, head_dim: int, kv_heads: int) -> str:
  """Returns the implementation for a platform: its kernel in the sizes that it has, else 'xla'.

  Args:
    kv_heads: key heads of one device.
  """
  # By the compiler for v5p. Smaller heads are padded to 128 numbers.
  if platform == 'tpu' and head_dim <= LANES and (kv_heads in (1, 2, 4) or kv_heads % 8 == 0):
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
  interpret: bool = False,
) -> Float[Array, 'B H h']:
  """Softmax(q kᵀ / √h) v of one token per row, over the first `length` positions of its pages.

  Args:
    length: at least 1.
    implementation: 'xla' anywhere, 'triton' on CUDA, 'ragged' on TPU.
    interpret: whether to interpret the kernel of 'triton', on any platform, for tests.
  """
  if implementation == 'ragged':
    return _ragged_decode(query, pages, table, length)
  if implementation == 'triton':
    return _triton(query, pages, table, length, interpret)
  view = gather_view(pages, table)
  batch, heads, size = query.shape
  query = (query * size**-0.5).reshape(batch, view.key.shape[1], -1, size)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum('bkgh,bkhs->bkgs', query, view.key, preferred_element_type=wide)
  mask = jnp.arange(view.key.shape[-1])[None] < length[:, None]
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, _MASKED), axis=-1)
  output = jnp.einsum('bkgs,bksh->bkgh', weights.astype(view.value.dtype), view.value)
  return output.reshape(batch, heads, size)


def _triton(query, pages, table, length, interpret):
  # Imported here: Pallas takes half a second to import, and only CUDA needs it.
  from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

  columns = table.shape[1]
  splits = _splits(query.shape[0] * pages.key.shape[0], columns)
  # The kernel wants whole parts. Pages beyond the length are not read.
  table = jnp.pad(table, ((0, 0), (0, -columns % splits)))
  query = query * query.shape[-1] ** -0.5  # the kernel does not scale
  return paged_attention(
    query,
    pages.key,
    pages.value,
    table,
    length,
    # Blocks of one page: the kernel reads whole blocks.
    pages_per_compute_block=1,
    k_splits=splits,
    interpret=interpret,
  )


def _splits(rows: int, columns: int) -> int:
  """Returns in how many parts the pages of a row are read, by as many programs.

  Enough to keep the device busy and no more, because each part writes a partial output.

  Args:
    rows: programs of one part: B K.
    columns: of the table.
  """
  splits = 1
  while rows * splits < _PROGRAMS and splits < columns:
    splits *= 2
  return splits


def _ragged_decode(query, pages, table, length):
  """Attention of one token per row, by the kernel for TPU."""
  # The kernel keeps the whole table in scalar memory, where a row of it fills whole lanes.
  rows = max(1, _SMEM // (4 * LANES * -(-table.shape[1] // LANES)))
  outputs = []
  for begin in range(0, query.shape[0], rows):
    part = slice(begin, begin + rows)
    tokens = query[part]
    start = jnp.arange(tokens.shape[0] + 1, dtype=jnp.int32)
    blocks = _decode_blocks(pages)
    outputs.append(_ragged(tokens, pages, table[part], length[part], start, start[-1], blocks))
  return jnp.concatenate(outputs)


def _ragged(query, pages, table, length, start, count, blocks):
  """Attention of the last tokens of each row, by the kernel for TPU.

  Args:
    blocks: (pages, queries) that are in the vector memory at once. The kernel's own choice looks at
      `jax.devices()`, which need not be the devices that it is compiled for.
  """
  # Imported here: Pallas takes half a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

  tokens, heads, size = query.shape
  kv_heads = pages.key.shape[2] // 2
  query = query.reshape(tokens, kv_heads, -1, size)
  group = query.shape[2]
  # Heads fill the lanes, and in float32 a block of the kernel is short of a tile with one per key.
  query = jnp.pad(query, ((0, 0), (0, 0), (0, max(0, 2 - group)), (0, LANES - size)))
  output = ragged_paged_attention(
    query.reshape(tokens, -1, LANES),
    pages.key,
    length,
    table,
    start,
    count[None],
    sm_scale=size**-0.5,
    num_kv_pages_per_block=max(1, min(blocks[0], table.shape[1], _BLOCK_PAGES)),
    num_queries_per_block=min(blocks[1], tokens),
    vmem_limit_bytes=_VMEM,
  )
  output = output.reshape(tokens, kv_heads, -1, LANES)[:, :, :group, :size]
  return output.reshape(tokens, heads, size)


def positions_at_once(pages: Pages, columns: int, implementation: str) -> int:
  """Returns how many positions of a row a kernel reads at once: the last block it reads whole.

  Args:
    pages: of one device.
    columns: of the table of pages.
  """
  blocks = min(_decode_blocks(pages)[0], columns, _BLOCK_PAGES) if implementation == 'ragged' else 1
  return max(1, blocks) * page_size(pages)


def _decode_blocks(pages: Pages) -> tuple[int, int]:
  """Returns (pages, queries) of a block of `_ragged` for one token per row.

  Every query of a block is multiplied with the keys of each of the block's rows, so that there are
  few: 8. And a row reads whole blocks: of 1 MiB, which hides the memory's latency, or of 512
  positions, about a response.
  """
  _, positions, heads, size = pages.key.shape
  page_bytes = positions * heads * size * pages.key.dtype.itemsize
  return min(2**20 // page_bytes, 512 // positions), 8


def _prefill_blocks(pages: Pages) -> tuple[int, int]:
  """Returns (pages, queries) of a block of `_ragged` for many tokens per row.

  Nearly all entries of the kernel's table for TPU v5 and v6 with pages of 64 positions have as many
  pages as a row, up to 1,024 positions, and 32 queries.
  """
  return 1024 // page_size(pages), 32


def prefill_attention(
  query: Float[Array, 'C H h'],
  key: Float[Array, 'C K h'],
  value: Float[Array, 'C K h'],
  pages: Pages,
  rows: PrefillRows,
  implementation: str,
) -> Float[Array, 'C H h']:
  """Causal softmax(q kᵀ / √h) v of a chunk of tokens, each over its own row up to itself.

  Only row 0 may have positions from before the chunk. Outputs of padding are 0.

  Args:
    key: of the tokens of the chunk.
    pages: with the keys and values of the chunk already written.
    implementation: as in `decode_attention`; 'triton' has no kernel for this and is as 'xla'.
  """
  is_token = (rows.segment > 0)[:, None, None]
  if implementation == 'ragged':
    # The kernel fetches the first page also without any row, but waits for it only with one: a
    # chunk of padding alone is a row of one token.
    start, length = rows.start.at[1].max(1), rows.length.at[0].max(1)
    count, blocks = jnp.maximum(rows.count, 1), _prefill_blocks(pages)
    output = _ragged(query, pages, rows.table, length, start, count, blocks)
    return jnp.where(is_token, output, 0)
  # Of a row that overflows, other rows in the chunk would see 0 times NaN. Its own next token reads
  # the pages, which keep what is not finite.
  key, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (key, value))
  inside = attention(query[None], key[None], value[None], segment_ids=rows.segment[None])[0]

  def with_prefix():
    first = _first_row(query, pages, rows.table[0], rows.length[0], prefix)
    return jnp.where((rows.segment == 1)[:, None, None], first, inside)

  prefix = rows.length[0] - rows.start[1]
  return jax.lax.cond(prefix > 0, with_prefix, lambda: inside)


def _first_row(
  query: Float[Array, 'C H h'],
  pages: Pages,
  table: Int[Array, 'M'],
  length: Int[Array, ''],
  prefix: Int[Array, ''],
) -> Float[Array, 'C H h']:
  """Attention of tokens at positions prefix, prefix + 1, ... to one row, block after block of keys.

  Softmax over blocks as in flash attention, https://arxiv.org/abs/2205.14135: no array is as long
  as the row, and no block beyond its length is read. Outputs of tokens beyond it are arbitrary.
  """
  tokens, heads, size = query.shape
  kv_heads = pages.key.shape[0]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query = (query * size**-0.5).reshape(tokens, kv_heads, heads // kv_heads, size)
  block_pages = min(max(_KEYS // page_size(pages), 1), table.shape[0])
  block = block_pages * page_size(pages)
  table = jnp.pad(table, (0, -table.shape[0] % block_pages))
  position = prefix + jnp.arange(tokens)

  def add_block(i, carry):
    peak, total, output = carry
    columns = jax.lax.dynamic_slice_in_dim(table, i * block_pages, block_pages)
    view = gather_view(pages, columns[None])
    logits = jnp.einsum('ckgh,khs->ckgs', query, view.key[0], preferred_element_type=wide)
    mask = i * block + jnp.arange(block)[None] <= position[:, None]
    logits = jnp.where(mask[:, None, None], logits, _MASKED)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
    weights, scale = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
    added = jnp.einsum(
      'ckgs,ksh->ckgh', weights.astype(view.value.dtype), view.value[0], preferred_element_type=wide
    )
    total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
    return new_peak, total, output * scale + added

  one = jnp.zeros((*query.shape[:-1], 1), wide)
  blocks = (length + block - 1) // block
  # Every token sees position 0, in the first block: no total is 0.
  start = (one + _MASKED, one, jnp.zeros(query.shape, wide))
  _, total, output = jax.lax.fori_loop(0, blocks, add_block, start)
  return (output / total).astype(query.dtype).reshape(tokens, heads, size)
