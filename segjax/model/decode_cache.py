"""What a layer of the decode programs does with its cache: write keys and values, and attend.

Two ways with one interface. A kernel ('triton', 'ragged') writes and reads the pages themselves.
Elsewhere ('xla') the pages of a chunk's rows are copied once into a dense view; the steps of the
chunk read it and a buffer of their own keys and values, which is written to the pages at the end:
on CPUs a gather in every step would cost as much as the attention.

Every function here works on the arrays of one device, mapped over the mesh: rows of a group have
their pages on the devices of the group, and no device sees another's heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from segjax.model import pages, sharding
from segjax.model.attention import KeyValue, cached_attention
from segjax.model.paged_attention import PrefillRows, decode_attention, prefill_attention
from segjax.model.pages import Pages

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class PrefillChunk(NamedTuple):
  """A chunk of prompts for each of D groups of rows: C tokens, of several prompts in turn.

  Attributes:
    ids: token ids; the padding may be any valid id.
    position: of each token in its prompt.
    rows: which tokens belong together, and their pages; see `paged_attention.PrefillRows`.
  """

  ids: Int[Array, 'D C']
  position: Int[Array, 'D C']
  rows: PrefillRows


# Names in the table of `sharding`.
_PAGES = {'xla': 'decode_pages', 'triton': 'decode_pages', 'ragged': 'decode_ragged_pages'}
_VIEW = KeyValue('decode_key', 'decode_value')


class _Paged(NamedTuple):
  """The pages of each row; a kernel reads and writes them."""

  table: Int[Array, 'B M']


class _View(NamedTuple):
  """A dense view of the pages of each row, which a chunk of steps only reads."""

  main: Any  # a KeyValue per layer where layers are unrolled, else one with layers in front
  length: Int[Array, 'B']  # positions of `main` that are filled


def open_cache(
  cache: Pages, table: Int[Array, 'B M'], length: Int[Array, 'B'], decoder: Any
) -> tuple[_Paged | _View, Any]:
  """Prepares the cache for a chunk of decode steps; `close_cache` ends it.

  Args:
    cache: the pages.
    table: pages of each row.
    length: filled positions of each row.
    decoder: the `decode.DecodeConfig`, as everywhere here.

  Returns:
    What the steps only read, and what they write: the pages, or a buffer for the chunk's own keys
    and values.
  """
  if decoder.paged_attention != 'xla':
    return _Paged(table), cache
  layers = range(decoder.config.num_hidden_layers)

  def gather(cache, table):
    return tuple(pages.gather_view(cache, table + _offset(cache, i, decoder)) for i in layers)

  names = _PAGES[decoder.paged_attention], 'decode_rows'
  main = sharding.shard_map_named(gather, names, (_VIEW,) * len(layers))(cache, table)
  recent = tuple(_empty_buffer(layer, decoder.chunk) for layer in main)
  if not decoder.unrolled:
    main, recent = (jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (main, recent))
  return _View(main, length), recent


def close_cache(
  cache: Pages,
  written: Any,
  table: Int[Array, 'B M'],
  position: Int[Array, 'B'],
  count: Int[Array, 'B'],
  decoder: Any,
) -> Pages:
  """Returns the pages after a chunk of steps.

  Args:
    cache: the pages before it.
    written: what the steps have written, see `open_cache`.
    table: pages of each row.
    position: of the first token of the chunk in each row.
    count: tokens of each row.
    decoder: see `open_cache`.
  """
  if isinstance(written, Pages):
    return written
  if not decoder.unrolled:
    layers = range(decoder.config.num_hidden_layers)
    written = tuple(jax.tree.map(lambda x, i=i: x[i], written) for i in layers)

  def append(cache, written, table, position, count):
    for i, layer in enumerate(written):
      offset = _offset(cache, i, decoder)
      cache = pages.append(cache, layer, table + offset, position, count, trash=offset)
    return cache

  layout, rows = _PAGES[decoder.paged_attention], 'decode_rows'
  names = (layout, (_VIEW,) * len(written), rows, rows, rows)
  return sharding.shard_map_named(append, names, layout)(cache, written, table, position, count)


def decode_layer(
  opened: tuple[_Paged | _View, Any],
  layer: Int[Array, ''] | int,
  position: Int[Array, 'B'],
  step: Int[Array, ''],
  active: Bool[Array, 'B'],
  decoder: Any,
) -> Attend:
  """Returns the attention of one token per row in a layer; it also returns what is written.

  Args:
    opened: what is read and what is written, see `open_cache`.
    layer: its number.
    position: of the token in its row.
    step: of the chunk, from 0.
    active: rows that are not active write to page 0 and read one page.
    decoder: see `open_cache`.
  """
  reader, written = opened
  if isinstance(reader, _View):
    return lambda *heads: _decode_in_view(heads, reader, written, layer, step)

  def run(heads, cache, rows, layer):
    query, key, value = (x[:, 0] for x in heads)
    table, position, active = rows
    offset = _offset(cache, layer, decoder)
    page = jnp.take_along_axis(table, (position // decoder.page_size)[:, None], axis=1)[:, 0]
    index = offset + jnp.where(active, page, 0)
    key, value = _zero_unless(active, key, value)
    cache = pages.write(cache, key, value, index, position % decoder.page_size)
    length = jnp.where(active, position + 1, 1)
    inputs = query, cache, table + offset, length, decoder.paged_attention
    attended = decode_attention(*inputs, kv_heads=key.shape[1])
    return attended[:, None], cache

  def attend(*heads):
    rows, layout = (reader.table, position, active), _PAGES[decoder.paged_attention]
    names = ('decode_heads', layout, 'decode_rows', 'scalar')
    return sharding.shard_map_named(run, names, ('decode_heads', layout))(
      heads, written, rows, jnp.asarray(layer, jnp.int32)
    )

  return attend


def _decode_in_view(heads, view: _View, written, layer, step):
  query, key, value = heads
  main, recent = _layer(view.main, layer), _layer(written, layer)
  update = jax.lax.dynamic_update_slice_in_dim
  # All rows write at `step`: a slice update, where positions of their own would scatter.
  recent = KeyValue(
    update(recent.key, key[:, 0, :, :, None].astype(recent.key.dtype), step, axis=3),
    update(recent.value, value[:, 0, :, None].astype(recent.value.dtype), step, axis=2),
  )
  attended = cached_attention(query[:, 0], main, recent, view.length, step)
  return attended[:, None], _with_layer(written, layer, recent)


def _layer(view, layer) -> KeyValue:
  if isinstance(view, KeyValue):  # layers in front
    return jax.tree.map(lambda x: x[layer], view)
  return view[layer]


def _with_layer(view, layer, new: KeyValue):
  if isinstance(view, KeyValue):
    return jax.tree.map(lambda x, y: x.at[layer].set(y), view, new)
  return (*view[:layer], new, *view[layer + 1 :])


def prefill_layer(
  cache: Pages,
  chunk: PrefillChunk,
  layer: Int[Array, ''] | int,
  decoder: Any,
  prefix_blocks: int | None = None,
) -> Attend:
  """Returns the attention of a chunk of prompts in a layer; it also returns the pages after it."""

  def run(heads, cache, position, rows, layer):
    # One group of rows per device.
    (query, key, value), position, rows = jax.tree.map(lambda x: x[0], (heads, position, rows))
    offset = _offset(cache, layer, decoder)
    page = rows.table[jnp.maximum(rows.segment - 1, 0), position // decoder.page_size]
    is_token = rows.segment > 0
    index = offset + jnp.where(is_token, page, 0)
    key, value = _zero_unless(is_token, key, value)
    cache = pages.write(cache, key, value, index, position % decoder.page_size)
    rows = rows._replace(table=rows.table + offset)
    inputs = (query, key, value, cache, rows, decoder.paged_attention)
    attended = prefill_attention(*inputs, prefix_blocks)
    return attended[None], cache

  def attend(*heads):
    layout = _PAGES[decoder.paged_attention]
    names = ('decode_heads', layout, 'decode_rows', 'decode_rows', 'scalar')
    return sharding.shard_map_named(run, names, ('decode_heads', layout))(
      heads, cache, chunk.position, chunk.rows, jnp.asarray(layer, jnp.int32)
    )

  return attend


def copy_pages(
  cache: Pages, source: Int[Array, 'D N'], target: Int[Array, 'D N'], decoder: Any
) -> Pages:
  """Copies pages of each group, in all layers."""

  def run(cache, source, target):
    return pages.copy_pages(cache, source[0], target[0], decoder.config.num_hidden_layers)

  layout = _PAGES[decoder.paged_attention]
  return sharding.shard_map_named(run, (layout, 'decode_rows', 'decode_rows'), layout)(
    cache, source, target
  )


def constrain_pages(cache: Pages, implementation: str) -> Pages:
  """Constrains the pages to the layout of an implementation of paged attention."""
  return jax.tree.map(lambda x: sharding.constrain(x, _PAGES[implementation]), cache)


def _zero_unless(mask: Bool[Array, 'T'], *arrays: Array) -> list[Array]:
  """Returns keys or values [T, K, h], 0 for the tokens that belong to no row."""
  return [jnp.where(mask[:, None, None], x, 0) for x in arrays]


def _offset(cache: Pages, layer: Int[Array, ''] | int, decoder: Any):
  """Returns the index of a layer's page 0 on this device."""
  axis = 0 if decoder.paged_attention == 'ragged' else 1
  return layer * (cache.key.shape[axis] // decoder.config.num_hidden_layers)


def _empty_buffer(view: KeyValue, size: int) -> KeyValue:
  """Returns zeros for `size` positions of the same rows and heads."""
  key, value = view
  return KeyValue(
    jnp.zeros((*key.shape[:-1], size), key.dtype),
    jnp.zeros((*value.shape[:-2], size, value.shape[-1]), value.dtype),
  )
