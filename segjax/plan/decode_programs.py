"""The programs of a rollout, with the shapes and layouts of their arguments."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from segjax.model import decode, decode_sizes, generate
from segjax.model.decode import DecodeConfig
from segjax.model.decode_sizes import PoolSize
from segjax.model.decode_weights import decode_weights
from segjax.model.paged_attention import block_counts
from segjax.model.paged_kernels import positions_at_once
from segjax.model.pages import Pages
from segjax.model.prefill_chunks import Read, prefill_chunks
from segjax.plan import abstract_arrays
from segjax.plan.phases import Phase

DECODE_PHASES = ('decode weights', 'prefill', 'page copies', 'decode chunk')
_HLO_DTYPES = {'bfloat16': 'bf16', 'float32': 'f32', 'float16': 'f16'}


@dataclasses.dataclass(frozen=True)
class DecodePrograms:
  """The programs of a rollout on the mesh of decoding.

  Attributes:
    size: of the pools of pages.
    weights: shapes of the weights that the steps read.
    pages: shapes of the pages.
    phases: the programs, with 'decode weights' and 'pages' among what is live.
  """

  decoder: DecodeConfig
  mesh: Mesh
  size: PoolSize
  weights: Any
  pages: Pages
  phases: list[Phase]

  @property
  def count(self) -> int:
    """How many programs a rollout compiles at most, whatever the lengths."""
    groups, decoder = self.mesh.shape['data'], self.decoder
    slots, columns = self.size.slots // groups, self.size.columns
    rows = {decode_sizes.chunk_rows(n, slots, decoder) for n in range(1, slots + 1)}
    tables = {decode_sizes.table_columns(n, columns, decoder) for n in range(1, columns + 1)}
    prefills = block_counts(columns, decoder.page_size, decoder.paged_attention)
    others = 3 + len(prefills)  # weights, pages, copies of pages
    return len(rows) * len(tables) + others

  def bytes_read(self, live: float | int, rows: float | None = None) -> dict[str, int]:
    """Returns what a call of a kernel reads of an array of pages on one device, by its shape.

    Args:
      live: positions that a row has on average.
      rows: of a group; None for those of a chunk of steps.
    """
    parts = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), self.pages
    )
    if self.decoder.paged_attention == 'xla':
      return {}
    at_once = positions_at_once(parts, self.size.columns, self.decoder.paged_attention)
    # Of the last block a half is live on average.
    rows = self.size.slots // self.mesh.shape['data'] if rows is None else rows
    positions = int(rows * (live + at_once // 2))
    all_pages = math.prod(parts.key.shape) * parts.key.dtype.itemsize
    axis = 0 if parts.value is None else 1  # of pages, before that of positions
    per_position = all_pages // math.prod(parts.key.shape[axis : axis + 2])
    shape = ','.join(map(str, parts.key.shape))
    return {f'{_HLO_DTYPES[parts.key.dtype.name]}[{shape}]': positions * per_position}


def decode_programs(
  decoder: DecodeConfig, mesh: Mesh, params: Any, size: PoolSize, longest: int
) -> DecodePrograms:
  """Returns the programs that generate responses.

  Args:
    decoder: see `generate.make_decode_config`.
    mesh: of decoding, see `mesh.decode_mesh`.
    params: shapes of the policy's parameters on the training mesh.
    size: of the pools of pages.
    longest: maximum tokens of a prompt.
  """
  groups = mesh.shape['data']
  static = {'decoder': decoder}
  structs = functools.partial(abstract_arrays.output_shape_structs, mesh)
  # All arrays are counted, also those that a single device passes on.
  lay_out = jax.jit(decode_weights, static_argnames='decoder')
  weights = structs(lay_out, params, **static)
  pages = structs(decode.empty_pages, groups, size.pages, **static)
  tokens = decode_sizes.prefill_size(longest, groups, decoder)
  read = Read(np.zeros(tokens, np.int32), [0] * -(-tokens // decoder.page_size))
  (prompts,) = prefill_chunks([[read]] * groups, size.columns, tokens)
  copies = np.zeros((groups, generate.COPIES), np.int32)
  rows = decode.empty_rows(size.slots, size.columns)
  # Most chunks begin within a prompt, and few prompts are longer than a block.
  counts = block_counts(size.columns, decoder.page_size, decoder.paged_attention)
  blocks = 1 if 1 in counts else None
  steps, key = np.int32(decoder.chunk), np.zeros(2, np.uint32)
  both = ('decode weights', 'pages')

  def phase(name, function, *arguments, live=both, passed_in=both, **more):
    return Phase(name, function, arguments, static | more, live, passed_in, mesh)

  lay_out_name, prefill_name, copies_name, chunk_name = DECODE_PHASES
  return DecodePrograms(
    decoder,
    mesh,
    size,
    weights,
    pages,
    [
      phase(lay_out_name, lay_out, params, live=(), passed_in=('sampled parameters',)),
      phase(prefill_name, decode.prefill, weights, pages, prompts, prefix_blocks=blocks),
      phase(copies_name, decode.copy_pages, pages, copies, copies, passed_in=('pages',)),
      phase(chunk_name, decode.decode_chunk, weights, pages, rows, steps, key),
    ],
  )
