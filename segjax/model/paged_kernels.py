"""Calls of the Pallas kernels of jax that read pages, and the blocks that they read at once.

'triton' is pallas/ops/gpu/paged_attention.py of https://github.com/jax-ml/jax, and 'ragged' is
pallas/ops/tpu/ragged_paged_attention. See `paged_attention` for what they compute.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model.pages import Pages, page_size
from segjax.model.splash import LANES

_PROGRAMS = 1024  # that keep a GPU busy: 8 for each of an H100's 132 processors
_BLOCK_PAGES = 16  # at most: each needs scalar registers of the TPU, which has 32
_VMEM = 64 * 2**20  # bytes of a TPU's vector memory that the kernel may use
_SMEM = 2**19  # bytes of a TPU's scalar memory, 1 MiB, that a table may take


def triton_decode(
  query: Float[Array, 'B H h'],
  pages: Pages,
  table: Int[Array, 'B M'],
  length: Int[Array, 'B'],
  interpret: bool,
) -> Float[Array, 'B H h']:
  """Attention of one token per row, by the kernel for CUDA."""
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


def ragged_decode(
  query: Float[Array, 'B H h'],
  pages: Pages,
  table: Int[Array, 'B M'],
  length: Int[Array, 'B'],
) -> Float[Array, 'B H h']:
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


def ragged_prefill(
  query: Float[Array, 'C H h'],
  pages: Pages,
  table: Int[Array, 'R M'],
  length: Int[Array, 'R'],
  start: Int[Array, 'R1'],
  count: Int[Array, ''],
) -> Float[Array, 'C H h']:
  """Attention of a chunk by the kernel for TPU; see `paged_attention.PrefillRows`.

  Outputs of padding are arbitrary.
  """
  # The kernel fetches the first page also without any row, but waits for it only with one: a chunk
  # of padding alone is a row of one token.
  start, length, count = start.at[1].max(1), length.at[0].max(1), jnp.maximum(count, 1)
  return _ragged(query, pages, table, length, start, count, _prefill_blocks(pages))


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
    num_kv_pages_per_block=_fitted(blocks[0], table.shape[1]),
    num_queries_per_block=min(blocks[1], tokens),
    vmem_limit_bytes=_VMEM,
  )
  output = output.reshape(tokens, kv_heads, -1, LANES)[:, :, :group, :size]
  return output.reshape(tokens, heads, size)


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


def positions_at_once(pages: Pages, columns: int, implementation: str) -> int:
  """Returns how many positions of a row a kernel reads at once: the last block it reads whole.

  Args:
    pages: of one device.
    columns: of the table of pages.
  """
  block = _fitted(_decode_blocks(pages)[0], columns) if implementation == 'ragged' else 1
  return block * page_size(pages)


def _fitted(block: int, columns: int) -> int:
  """Returns the pages of a block of `_ragged`, at least 1, for a table of so many columns."""
  return max(1, min(block, columns, _BLOCK_PAGES))
