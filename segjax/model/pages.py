"""Keys and values in pages: fixed blocks of positions, so that rows take only what they need.

One array has the pages of all layers, so that a program updates one array in place. Layer l of L
has N pages: its page p is entry l N + p. Page 0 of each layer is the trash page: it belongs to no
row, and what is written for no row is zeros, written there. A table on the host says which pages a
row has, in order: position s of a row is offset s mod P of its page s // P. The idea is vLLM's,
https://arxiv.org/abs/2309.06180.

All functions work on the arrays of one device: the pages of its group of rows, the heads it holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model.attention import KeyValue
from segjax.model.llama import LlamaConfig
from segjax.model.splash import LANES


class Pages(NamedTuple):
  """Pages of P positions, laid out for the implementation of `paged_attention` that reads them.

  Attributes:
    key: [K, L N, P, h] for 'xla' and 'triton'. For 'ragged' [L N, P, 2 K', 128], keys and values
      alternating: head k has its keys at 2 k and its values at 2 k + 1, followed by zeros. K' is
      `kernel_heads`; heads from K on are zeros.
    value: as `key`; None for 'ragged'.
  """

  key: Array
  value: Array | None


def kernel_heads(kv_heads: int) -> int:
  """Returns the key heads that pages for 'ragged' have on a device with `kv_heads` of them.

  The kernel wants whole tiles of keys and values; 3 and 5 heads, which fill none, get zeros beside
  them.
  """
  return next((count for count in (1, 2, 4) if count >= kv_heads), -(-kv_heads // 8) * 8)


def empty_pages(
  config: LlamaConfig,
  groups: int,
  num_pages: int,
  page_size: int,
  implementation: str,
  tensor: int = 1,
) -> Pages:
  """Returns zeros in the compute dtype, for `groups` groups of rows with N = `num_pages` each.

  The axis of pages has the groups one after the other, so that splitting it over the devices gives
  each group the L N pages of its own.

  Args:
    config: the network.
    groups: of rows.
    num_pages: N.
    page_size: P.
    implementation: of `paged_attention`.
    tensor: devices of a group, among which the heads are split.
  """
  pages = groups * config.num_hidden_layers * num_pages
  heads, size = config.num_key_value_heads, config.head_dim
  # Zeros, not `jnp.empty`: a masked value is multiplied by 0, and 0 times NaN is NaN.
  if implementation == 'ragged':
    heads = tensor * kernel_heads(heads // tensor)
    return Pages(jnp.zeros((pages, page_size, 2 * heads, LANES), config.dtype), None)
  shape = (heads, pages, page_size, size)
  return Pages(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def page_size(pages: Pages) -> int:
  """Returns P, the positions of a page."""
  return pages.key.shape[_page_axis(pages) + 1]


def _page_axis(pages: Pages) -> int:
  return 0 if pages.value is None else 1


def write(
  pages: Pages,
  key: Float[Array, 'T K h'],
  value: Float[Array, 'T K h'],
  index: Int[Array, 'T'],
  offset: Int[Array, 'T'],
) -> Pages:
  """Writes one position per token, in place where `pages` is donated or carried by a loop.

  Args:
    index: of the page, l N + p. Only the trash page may occur twice with one offset, and only zeros
      may be written there: a masked value is multiplied by 0, and 0 times NaN is NaN.
    offset: within the page.
  """
  key, value = key.astype(pages.key.dtype), value.astype(pages.key.dtype)
  if pages.value is None:
    both = jnp.stack([key, value], axis=2).reshape(key.shape[0], -1, key.shape[2])
    extra = pages.key.shape[2] - both.shape[1], LANES - key.shape[2]
    both = jnp.pad(both, ((0, 0), (0, extra[0]), (0, extra[1])))
    return Pages(pages.key.at[index, offset].set(both), None)
  return Pages(
    pages.key.at[:, index, offset].set(key.swapaxes(0, 1)),
    pages.value.at[:, index, offset].set(value.swapaxes(0, 1)),
  )


def copy_pages(
  pages: Pages, source: Int[Array, 'n'], target: Int[Array, 'n'], num_layers: int
) -> Pages:
  """Copies pages onto others, in all layers.

  Args:
    source: numbers of pages within a layer; all are read before any is written. Unused entries copy
      page 0 onto itself.
    target: as `source`.
  """
  axis = _page_axis(pages)
  pages_per_layer = pages.key.shape[axis] // num_layers

  def copy_layer(layer, pages):
    begin = layer * pages_per_layer

    def copy(x):
      if pages.value is None:
        return _copy_one_by_one(x, begin + source, begin + target)
      at = (slice(None),) * axis
      return x.at[(*at, begin + target)].set(x[(*at, begin + source)])

    return jax.tree.map(copy, pages)

  # Layer by layer: the pages that are copied exist twice for a moment.
  return jax.lax.fori_loop(0, num_layers, copy_layer, pages)


def _copy_one_by_one(x: Array, source: Int[Array, 'n'], target: Int[Array, 'n']) -> Array:
  """Copies entries of axis 0; to scatter them, XLA for TPUs would give all of x another layout."""
  slice_in_dim, update = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim
  count = len(source)
  copied = jax.lax.fori_loop(
    0,
    count,
    lambda i, copied: update(copied, slice_in_dim(x, source[i], 1), i, axis=0),
    jnp.zeros((count, *x.shape[1:]), x.dtype),
  )
  return jax.lax.fori_loop(
    0, count, lambda i, x: update(x, slice_in_dim(copied, i, 1), target[i], axis=0), x
  )


def gather_view(pages: Pages, table: Int[Array, 'B M']) -> KeyValue:
  """Gathers the pages of each row, one after the other, from pages for 'xla' or 'triton'.

  Args:
    table: indices l N + p.

  Returns:
    Keys [B, K, h, S] and values [B, K, S, h], S = M P.
  """
  heads, entries, positions, size = pages.key.shape
  batch, columns = table.shape
  # Pages of all heads in one axis: each is copied to its place, without a transpose after it.
  index = entries * jnp.arange(heads)[None, :, None] + table[:, None]
  key, value = (x.reshape(-1, positions, size)[index] for x in pages)  # [B, K, M, P, h]
  key = key.transpose(0, 1, 4, 2, 3).reshape(batch, heads, size, columns * positions)
  value = value.reshape(batch, heads, columns * positions, size)
  return KeyValue(key, value)


def append(
  pages: Pages,
  recent: KeyValue,
  table: Int[Array, 'B M'],
  position: Int[Array, 'B'],
  count: Int[Array, 'B'],
  trash: Int[Array, ''] | int,
) -> Pages:
  """Writes the first `count` positions of each row's buffer into its pages.

  Args:
    recent: the buffer: keys [B, K, h, C] and values [B, K, C, h].
    table: indices l N + p.
    position: in the row, of the buffer's first.
    trash: index l N of the layer's trash page, where the rest of the buffer is written.
  """
  batch, heads, size, length = recent.key.shape
  step = jnp.arange(length)[None]
  positions = position[:, None] + step  # [B, C]
  column, offset = jnp.divmod(positions, page_size(pages))
  # Beyond `count` the column may be beyond the table: clipped, and not used.
  index = jnp.take_along_axis(table, column, axis=1, mode='clip')
  is_real = step < count[:, None]
  index = jnp.where(is_real, index, trash)
  key = jnp.where(is_real[..., None, None], recent.key.transpose(0, 3, 1, 2), 0)
  value = jnp.where(is_real[..., None, None], recent.value.swapaxes(1, 2), 0)
  key, value = (x.reshape(batch * length, heads, size) for x in (key, value))
  return write(pages, key, value, index.reshape(-1), offset.reshape(-1))
