"""The jitted programs of a rollout: prefill, copies of pages, and chunks of decode steps.

Keys and values of the live tokens lie in pages on the devices (`pages`), are written in place and
read by lengths. Everything else is the host's (`scheduler`), which passes it with each call: which
pages a row has, its last token, its position, its random key. A row is a response; rows are in
groups, one per part of the mesh's data axis, and a group's rows have pages on their own devices
alone.

The last token of a row is not in its pages yet: a step writes its key and value, and draws the next
token from its logits. So prefill, which reads all tokens but the last, returns no logits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from segjax.model import decode_cache, fused_head, pages, sharding
from segjax.model.decode_cache import PrefillChunk
from segjax.model.layers import RMSNorm
from segjax.model.llama import Block, LlamaConfig
from segjax.model.pages import Pages
from segjax.model.sampling import Sampling, has_no_finite_logit, sample_token


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static configuration of a generation; hashable, for jit.

  Attributes:
    chunk: steps between two returns to the host.
    unrolled: whether each layer is traced on its own; else layers are scanned, and compile time
      does not grow with their number.
    paged_attention: implementation, see `paged_attention`.
    page_size: positions of a page.
    tensor: devices that share a copy of the weights, see `mesh.decode_mesh`; 0 is its default.
    weights_dtype: one of `choices.ROLLOUT_WEIGHTS`; see `precision.cast_for_use`.
  """

  config: LlamaConfig
  sampling: Sampling
  stop_ids: tuple[int, ...]
  chunk: int = 16
  unrolled: bool = True
  paged_attention: str = 'xla'
  page_size: int = 64
  tensor: int = 0
  weights_dtype: str = 'compute_dtype'


class DecodeWeights(NamedTuple):
  """The policy's weights in the compute dtype, laid out for decoding."""

  embedding: Float[Array, 'V D']
  layers: Any  # collections of `Block`: a tuple of layers where they are unrolled, else stacked
  norm: Any
  head: Float[Array, 'D V']


class DecodeRows(NamedTuple):
  """Rows of a chunk of steps; a row that is not active is free.

  Attributes:
    table: pages of the row, by position // page size.
    token: the last token of the row.
    position: of that token.
    count: tokens of the response so far.
    limit: maximum of `count`.
    number: of the prompt and of the sample, from which the response's own random key follows.
    active: whether the row holds an unfinished response.
  """

  table: Int[Array, 'B M']
  token: Int[Array, 'B']
  position: Int[Array, 'B']
  count: Int[Array, 'B']
  limit: Int[Array, 'B']
  number: UInt32[Array, 'B 2']
  active: Bool[Array, 'B']


def empty_rows(size: int, columns: int) -> DecodeRows:
  """Returns `size` free rows with room for `columns` pages each, on the host."""
  zeros = np.zeros(size, np.int32)
  return DecodeRows(
    table=np.zeros((size, columns), np.int32),
    token=zeros,
    position=zeros.copy(),
    count=zeros.copy(),
    limit=zeros.copy(),
    number=np.zeros((size, 2), np.uint32),
    active=np.zeros(size, bool),
  )


class ChunkOutput(NamedTuple):
  """The tokens of a chunk: the first `count` of each row are real.

  `stop` says whether any process wants to stop; None where there is one process.
  """

  ids: Int[Array, 'B C']
  logprob: Float[Array, 'B C']
  sample_logprob: Float[Array, 'B C']
  count: Int[Array, 'B']
  finished: Bool[Array, 'B']  # ended in a stop token
  non_finite: Bool[Array, 'B']  # ended in logits without a finite value
  stop: Bool[Array, ''] | None = None


# For programs that update the cache: without a donation there would be a second one. XLA for GPUs
# counts each write to the pages as another copy of them, takes the program for too large, and would
# compute products twice to save memory (8B: 331 instructions): hence the percentage of the memory.
_jit_in_place = functools.partial(
  jax.jit,
  static_argnames='decoder',
  donate_argnames='cache',
  compiler_options={'xla_gpu_memory_limit_slop_factor': '1000'},
)


@functools.partial(jax.jit, static_argnames=('groups', 'num_pages', 'decoder'))
def empty_pages(groups: int, num_pages: int, *, decoder: DecodeConfig) -> Pages:
  """Returns `num_pages` pages of zeros for each layer and group of rows, page 0 included."""
  mesh = sharding.active_mesh()
  sizes = groups, num_pages, decoder.page_size
  empty = pages.empty_pages(
    decoder.config, *sizes, decoder.paged_attention, mesh.shape['tensor'] if mesh else 1
  )
  return decode_cache.constrain_pages(empty, decoder.paged_attention)


@functools.partial(_jit_in_place, static_argnames=('decoder', 'prefix_blocks'))
def prefill(
  weights: DecodeWeights,
  cache: Pages,
  chunk: PrefillChunk,
  *,
  decoder: DecodeConfig,
  prefix_blocks: int | None = None,
) -> Pages:
  """Writes the keys and values of a chunk of prompts into their pages.

  Args:
    prefix_blocks: of the chunk's rows, see `paged_attention.prefix_blocks`; None fits any chunk.
  """
  block = Block(decoder.config, 'decode_')

  def run_layer(x, layer, index, cache):
    attend = decode_cache.prefill_layer(cache, chunk, index, decoder, prefix_blocks)
    inputs = (layer, x, chunk.position, attend)
    return block.apply(*inputs, method='with_cache')

  x = _embed(weights, chunk.ids)
  _, cache = _through_layers(run_layer, x, cache, weights, decoder)
  # The layout it had on entry: donated buffers cannot be reused for another.
  return decode_cache.constrain_pages(cache, decoder.paged_attention)


@_jit_in_place
def copy_pages(
  cache: Pages, source: Int[Array, 'D N'], target: Int[Array, 'D N'], *, decoder: DecodeConfig
) -> Pages:
  """Copies pages of each group, in all layers; page 0 may be copied to itself, to fill up."""
  cache = decode_cache.copy_pages(cache, source, target, decoder)
  return decode_cache.constrain_pages(cache, decoder.paged_attention)


@_jit_in_place
def decode_chunk(
  weights: DecodeWeights,
  cache: Pages,
  rows: DecodeRows,
  steps: Int[Array, ''],
  key: UInt32[Array, '2'],
  wants_stop: Bool[Array, 'N'] | None = None,
  *,
  decoder: DecodeConfig,
) -> tuple[Pages, ChunkOutput]:
  """Samples up to `steps` tokens, at most `decoder.chunk`, for every active row.

  Args:
    key: data of the random key of the generation.
    wants_stop: a flag of each device, where there are several processes.
  """
  block = Block(decoder.config, 'decode_')
  # It may lie on the mesh of training.
  keys = _response_keys(sharding.constrain(key, 'replicated'), rows.number)
  reader, written = decode_cache.open_cache(cache, rows.table, rows.position, decoder)

  def step(carry):
    j, token, active, written, output = carry
    position = rows.position + j

    def run_layer(x, layer, index, written):
      attend = decode_cache.decode_layer((reader, written), index, position, j, active, decoder)
      inputs = (layer, x, position[:, None], attend)
      return block.apply(*inputs, method='with_cache')

    # Finished rows run along, since shapes are fixed: their tokens are not recorded.
    x = _embed(weights, token[:, None])
    x, written = _through_layers(run_layer, x, written, weights, decoder)
    logits = _logits(weights, x, decoder)
    token, active, output = _draw(j, logits, active, output, rows, keys, decoder)
    return j + 1, token, active, written, output

  def unfinished(carry):
    j, _, active, _, _ = carry
    more = (j < steps) & (j < decoder.chunk)
    # Where rows are split, the question would be asked of all devices in every step.
    return more if sharding.splits_rows() else more & jnp.any(active)

  # Not a scan: the loop can end early, and nothing here is differentiated.
  start = (jnp.int32(0), rows.token, rows.active, written, _empty_output(rows, decoder))
  _, _, _, written, output = jax.lax.while_loop(unfinished, step, start)
  cache = decode_cache.close_cache(cache, written, rows.table, rows.position, output.count, decoder)
  if wants_stop is not None:
    # Whole in every process, which then need not exchange the tokens.
    whole = sharding.replicated(sharding.active_mesh())
    output = output._replace(stop=jnp.any(wants_stop))
    output = jax.lax.with_sharding_constraint(output, whole)
  # The layout it had on entry: donated buffers cannot be reused for another.
  return decode_cache.constrain_pages(cache, decoder.paged_attention), output


def _empty_output(rows: DecodeRows, decoder: DecodeConfig) -> ChunkOutput:
  shape = (rows.token.shape[0], decoder.chunk)
  ids = jnp.full(shape, jnp.int32(decoder.stop_ids[0]))  # int32 with x64 too, as `token`
  wide = jnp.promote_types(decoder.config.dtype, jnp.float32)  # as the logits
  zeros, no_row = jnp.zeros(shape, wide), jnp.zeros(shape[0], bool)
  return ChunkOutput(ids, zeros, zeros, jnp.zeros(shape[0], jnp.int32), no_row, no_row)


def _response_keys(key: UInt32[Array, '2'], number: UInt32[Array, 'B 2']) -> Array:
  """Returns the random key of each response, by its number: no row or other response matters."""

  def fold(prompt, sample):
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), prompt), sample)

  return jax.vmap(fold)(number[:, 0], number[:, 1])


def _draw(j, logits, active, output: ChunkOutput, rows: DecodeRows, keys, decoder: DecodeConfig):
  """Draws token j of the chunk: (token, rows still active, output with the token recorded)."""
  stop = jnp.asarray(decoder.stop_ids, jnp.int32)
  count = rows.count + j
  non_finite = active & has_no_finite_logit(logits)
  drawing = active & ~non_finite  # such a response ends; the others continue
  uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(keys, count)
  drawn = sample_token(logits, uniform, count, stop, decoder.sampling)
  token = jnp.where(drawing, drawn.token, stop[0])  # padding is a valid id
  finished = drawing & jnp.any(token[:, None] == stop[None], axis=1)
  output = ChunkOutput(
    output.ids.at[:, j].set(token),
    output.logprob.at[:, j].set(jnp.where(drawing, drawn.logprob, 0)),
    output.sample_logprob.at[:, j].set(jnp.where(drawing, drawn.sample_logprob, 0)),
    output.count + drawing,
    output.finished | finished,
    output.non_finite | non_finite,
  )
  return token, drawing & ~finished & (count + 1 < rows.limit), output


def _through_layers(step, x, cache, weights: DecodeWeights, decoder: DecodeConfig):
  """Runs `x, cache = step(x, layer, index, cache)` for all layers: (x, cache)."""
  if decoder.unrolled:
    for index, layer in enumerate(weights.layers):
      x, cache = step(x, layer, index, cache)
    return x, cache
  indices = jnp.arange(decoder.config.num_hidden_layers)
  (x, cache), _ = jax.lax.scan(
    lambda carry, layer: (step(carry[0], *layer, carry[1]), None),
    (x, cache),
    (weights.layers, indices),
  )
  return x, cache


def _embed(weights: DecodeWeights, ids):
  # Each device looks ids up in its part of the vocabulary: the table is never gathered.
  return sharding.constrain(weights.embedding[ids], 'decode_hidden')


def _logits(weights: DecodeWeights, x, decoder: DecodeConfig):
  """Returns float32 logits [B, V]."""
  hidden = RMSNorm(decoder.config.rms_norm_eps).apply({'params': weights.norm}, x)
  # Split by V first: if the product had complete rows, XLA might gather the head instead of them.
  logits = fused_head.logit_product(hidden[:, 0], weights.head, decoder.config.round_logits)
  logits = sharding.constrain(logits[:, None], 'decode_logits')[:, 0]
  return sharding.constrain(logits, 'decode_row_logits')  # sampling needs complete rows
