"""How many responses are decoded at once: what the devices have memory for.

Weights, pages and the temporaries of the programs are counted in bytes of one device. Sizes are
settled once for equal generations, because other sizes would be other programs.
"""

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from segjax import processes
from segjax.errors import UserError
from segjax.model import decode_sizes, heads
from segjax.model.decode import DecodeConfig
from segjax.model.decode_sizes import PoolSize
from segjax.model.decode_weights import decode_weights
from segjax.model.pages import kernel_heads
from segjax.model.splash import LANES

_SHARE = 0.9  # of the free memory: allocators leave gaps, and other arrays come and go
# Logits of a row that exist at once, in float32. By the compilers for H100 and v5p a chunk has 1.0
# without and 2.2 to 3.1 with top_p, its activations included.
_LOGITS = 3.5
# Page 0, and a copy of the last page of a prompt for one of its samples.
_EXTRA_PAGES = 2


class _Bytes(NamedTuple):
  """What decoding needs of a device.

  Attributes:
    weights: in the layout of decoding.
    exchange: while the weights cross devices, beside them; no page exists yet.
    prefill: activations of a chunk of prompts.
    row: of each row of the device's group, but for its pages.
    page: a page in all layers.
  """

  weights: float
  exchange: float
  prefill: float
  row: float
  page: float


_settled: dict[tuple, PoolSize] = {}


def settle_pool(
  decoder: DecodeConfig,
  mesh: Mesh,
  *,
  responses: int,
  longest: int,
  mean_prompt: float,
  max_concurrent: int,
) -> PoolSize:
  """Returns `plan_pool` for the memory that is free now on the devices of all processes.

  Equal arguments get the sizes of the first time as long as they fit, whatever `mean_prompt`.
  """
  free = processes.smallest(_free_bytes(mesh))
  key = decoder, mesh, responses, longest, max_concurrent
  size = _settled.get(key)
  if size is None or _needed(size, decoder, mesh) > free:
    _settled[key] = size = plan_pool(
      decoder,
      mesh,
      responses=responses,
      longest=longest,
      mean_prompt=mean_prompt,
      max_concurrent=max_concurrent,
      free_bytes=free,
    )
  return size


def plan_pool(
  decoder: DecodeConfig,
  mesh: Mesh,
  *,
  responses: int,
  longest: int,
  mean_prompt: float,
  max_concurrent: int,
  free_bytes: float,
) -> PoolSize:
  """Returns how many responses are decoded at once, and with how many pages.

  Args:
    decoder: the static configuration.
    mesh: of decoding.
    responses: to sample, at most so many at once.
    longest: maximum tokens of a prompt.
    mean_prompt: mean tokens of a prompt, divided by the samples that share its pages.
    max_concurrent: responses at once; 0 for as many as have room with the mean prompt and half of
      the longest response. They get pages for their full length where these fit, else as many as
      fit: a response that finds none waits.
    free_bytes: of a device.

  Raises:
    UserError: not even one response fits, or not the rows of `max_concurrent`.
  """
  groups, columns = mesh.shape['data'], decode_sizes.max_columns(longest, decoder)
  need = _bytes(decoder, mesh, columns)
  room = free_bytes * _SHARE - need.weights - need.prefill
  # Of a group, as everything below: its devices share its rows.
  least = need.row + (columns + _EXTRA_PAGES) * need.page
  if room < least or free_bytes < need.weights + need.exchange:
    raise UserError(_does_not_fit(decoder, longest, need, least, free_bytes))
  room -= _EXTRA_PAGES * need.page
  if max_concurrent:
    slots = _round_slots(max_concurrent, responses, mesh)
    fits = _fitting_slots((room - columns * need.page) / need.row, responses, mesh)
    if slots > fits:
      raise UserError(
        f'rollout.max_concurrent={max_concurrent} needs {_gib(slots // groups * need.row)} GiB per '
        f'device beside {_gib(need.weights)} GiB of weights and the pages of one response, and '
        f'{_gib(free_bytes)} GiB are free; set it to at most {fits}, or to 0 for as many as fit.'
      )
  else:
    mean_pages = (mean_prompt + decoder.sampling.max_new_tokens / 2) / decoder.page_size + 0.5
    fits = _fitting_slots(room / (need.row + mean_pages * need.page), responses, mesh)
    slots = min(fits, _round_slots(responses, responses, mesh))
  rows = slots // groups
  # More pages than all rows can fill would never be used.
  pages = int(min(rows * columns, (room - rows * need.row) / need.page))
  return PoolSize(slots, pages + _EXTRA_PAGES, columns)


def _round_slots(slots: int, responses: int, mesh: Mesh) -> int:
  """Rounds up to what divides over the groups; over all devices, which then sample equal parts."""
  groups = mesh.shape['data']
  slots = decode_sizes.round_up(slots, mesh.size if slots >= mesh.size else groups)
  # At most the responses: a rollout that carries some has room for as many.
  return max(min(slots, responses // groups * groups), groups)


def _fitting_slots(rows: float, responses: int, mesh: Mesh) -> int:
  """Returns the slots of groups that have memory for so many rows, rounded down likewise."""
  rows = max(int(min(rows, responses)), 1)  # it may be infinite; and one is known to fit
  slots = rows * mesh.shape['data']
  return slots // mesh.size * mesh.size or mesh.shape['data']


def _needed(size: PoolSize, decoder: DecodeConfig, mesh: Mesh) -> float:
  need = _bytes(decoder, mesh, size.columns)
  rows = size.slots // mesh.shape['data']
  return need.weights + need.prefill + rows * need.row + size.pages * need.page


def _does_not_fit(
  decoder: DecodeConfig, longest: int, need: _Bytes, least: float, free: float
) -> str:
  max_new_tokens = decoder.sampling.max_new_tokens
  if free * _SHARE < need.weights + need.exchange + need.prefill:
    fix = 'use more devices'
  else:
    fix = 'lower data.max_prompt_length or rollout.max_new_tokens, or use more devices'
  return (
    f'decoding needs {_gib(need.weights)} GiB of weights per device'
    f'{f" ({_gib(need.exchange)} GiB more while they are moved)" if need.exchange else ""}, and '
    f'{_gib(need.prefill + least)} GiB for one response (a prompt of up to {longest} tokens, '
    f'rollout.max_new_tokens={max_new_tokens}); {_gib(free)} GiB are free; {fix}.'
  )


def _bytes(decoder: DecodeConfig, mesh: Mesh, columns: int) -> _Bytes:
  c, tensor = decoder.config, mesh.shape['tensor']
  itemsize = jnp.dtype(c.dtype).itemsize
  # Keys and values of a position, in all layers; the TPU's kernel has whole tiles of heads.
  kv_heads, size = c.num_key_value_heads // tensor, c.head_dim
  if decoder.paged_attention == 'ragged':
    kv_heads, size = kernel_heads(kv_heads), LANES
  position = 2 * c.num_hidden_layers * kv_heads * size * itemsize
  weights = _weight_bytes(decoder, tensor)
  wide = max(itemsize, 4)
  # What a layer has at once for a token: its input, its heads, both halves of the MLP.
  heads_width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
  token = itemsize * (4 * c.hidden_size + (heads_width + 3 * c.intermediate_size) // tensor)
  row = token + _LOGITS * wide * c.vocab_size / tensor
  if decoder.paged_attention == 'xla':
    # The dense view and its buffer; one layer of the view exists twice while it is gathered.
    view = columns * decoder.page_size * (1 + 1 / c.num_hidden_layers)
    row += (view + decoder.chunk) * position
  tokens = decode_sizes.prefill_size(c.max_position_embeddings, mesh.shape['data'], decoder)
  # Without a kernel the logits of the chunk's attention exist for all heads.
  logits = c.num_attention_heads // tensor * tokens**2 * wide
  return _Bytes(
    weights=weights,
    # By the compilers 0.5 to 1.2 of the weights, where one copy is gathered from many devices most.
    exchange=1.2 * weights if mesh.size > 1 else 0,
    prefill=2 * (tokens * token + logits),
    row=row,
    page=position * decoder.page_size,
  )


@functools.cache  # tracing takes half a second
def _weight_bytes(decoder: DecodeConfig, tensor: int) -> float:
  """Returns the bytes of `decode_weights` on one of the `tensor` devices of a group."""
  params = heads.param_shapes(decoder.config, 'language')
  weights = jax.eval_shape(functools.partial(decode_weights, decoder=decoder), params)

  def size(leaf):
    # As in the table of `sharding`: matrices are split where they divide, norms are not.
    is_split = leaf.ndim > 1 and any(dim % tensor == 0 for dim in leaf.shape[-2:])
    return math.prod(leaf.shape) * leaf.dtype.itemsize / (tensor if is_split else 1)

  return sum(map(size, jax.tree.leaves(weights)))


def _free_bytes(mesh: Mesh) -> float:
  """Returns the free bytes of the fullest local device; infinite if the backend reports none."""
  devices = mesh.local_devices  # a process cannot ask for the memory of another's devices
  if devices[0].platform == 'cpu':
    return _host_bytes() / mesh.size  # the devices of a CPU share the memory of the host
  stats = [device.memory_stats() or {} for device in devices]
  return min(s.get('bytes_limit', math.inf) - s.get('bytes_in_use', 0) for s in stats)


def _host_bytes() -> float:
  """Returns the bytes of the host that programs can still get, cached files included."""
  meminfo = Path('/proc/meminfo')
  if meminfo.is_file():
    fields = dict(line.split(':', 1) for line in meminfo.read_text(encoding='utf-8').splitlines())
    return 1024.0 * int(fields['MemAvailable'].split()[0])
  # Elsewhere what is free is not told, as on macOS: all of it, or no bound.
  if 'SC_PHYS_PAGES' not in getattr(os, 'sysconf_names', ()):
    return math.inf
  return float(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))


def _gib(size: float) -> str:
  return f'{size / 2**30:.2f}'
