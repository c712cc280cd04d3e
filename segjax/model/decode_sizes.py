"""Sizes of the decode programs, and whether prompts and cache fit.

Sizes are rounded up to few values, so that few programs are compiled.
"""

import math
import os

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.decode import DecodeConfig
from segjax.model.llama import num_parameters

_PREFILL_TOKENS = 1 << 16  # of one prefill, padding included: its activations must fit
_STEP = 512  # positions; up to it sizes are powers of two, then multiples of it


def cache_bucket(size: int) -> int:
  """Rounds a number of cache positions up."""
  return _bucket(size, 64)  # smaller ones would only add programs


def prompt_bucket(size: int) -> int:
  """Rounds the length of a prompt up."""
  return _bucket(size, 16)  # smaller than for the cache: prefill works on padding too


def prefill_rows(prompts: int, rows_multiple: int) -> int:
  """Returns the rows of a prefill of `prompts` prompts: a power of two, divisible as required."""
  # Rows that do not divide are not split: several devices would prefill the same ones.
  return round_up(_next_power_of_two(prompts), rows_multiple)


def max_prefill_prompts(size: int, rows_multiple: int) -> int:
  """Returns the maximum number of prompts of `size` positions in one prefill."""
  return max(_PREFILL_TOKENS // size, rows_multiple)  # at least one prompt per device


def prefill_shape(prompts: int, length: int, decoder: DecodeConfig, mesh: Mesh) -> tuple[int, int]:
  """Returns (rows, positions) of the largest prefill of `prompts` prompts of that length."""
  size, multiple = prompt_bucket(length), sharding.decode_rows(decoder.layout, mesh)
  return prefill_rows(min(prompts, max_prefill_prompts(size, multiple)), multiple), size


def cache_positions(longest: int, decoder: DecodeConfig) -> tuple[int, int]:
  """Returns (cache positions before the last growth, cache positions after it).

  The first is 0 for a cache that does not grow. `longest` is the length of the longest prompt.
  """
  first = cache_bucket(longest + decoder.chunk)
  last = cache_bucket(longest + decoder.sampling.max_new_tokens + decoder.chunk)
  # The next smaller bucket: sizes double up to _STEP, then grow by it.
  before = last - _STEP if last > _STEP else last // 2
  return (max(first, before) if first < last else 0), last


def check_prompts(length: np.ndarray, decoder: DecodeConfig) -> None:
  """Raises UserError unless every prompt has a token and leaves room for a response.

  Args:
    length: tokens of each prompt, [N].
  """
  if not (length > 0).all():
    raise UserError(f'prompt {int(np.argmin(length))} is empty; leave it out.')
  max_new_tokens = decoder.sampling.max_new_tokens
  room = decoder.config.max_position_embeddings - max_new_tokens  # no further position was trained
  if length.max() > room:
    row = int(np.argmax(length))
    raise UserError(
      f'prompt {row} has {length[row]} tokens; with max_new_tokens={max_new_tokens} the network '
      f'has positions for {room}; shorten the prompt or lower max_new_tokens.'
    )


def check_memory(slots: int, longest: int, decoder: DecodeConfig, mesh: Mesh) -> None:
  """Raises UserError, naming a number of slots that fits, if weights and cache do not.

  Args:
    slots: responses decoded at once.
    longest: tokens of the longest prompt.
  """
  c = decoder.config
  before, last = cache_positions(longest, decoder)
  itemsize = jnp.dtype(c.dtype).itemsize  # of weights and cache alike, see `decode_weights`
  # Grouped queries: only the key heads are stored, and 2 is for keys and values.
  per_position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize
  # While the cache grows to its last size, the one before is still allocated.
  per_slot = (last + before) * per_position // mesh.size  # of each device
  # Each part of the data axis has its own copy of the weights.
  weights = num_parameters(c) * itemsize * mesh.shape['data'] // mesh.size
  free = _free_bytes(mesh)
  if weights + slots * per_slot > free:
    fits = max(int((free - weights) // per_slot), 0)
    fix = f'set max_concurrent to at most {fits}' if fits else 'use more devices'
    raise UserError(
      f'decoding {slots} responses at once needs {weights / 2**30:.2f} GiB of weights and '
      f'{slots * per_slot / 2**30:.2f} GiB of key/value cache per device ({last} positions each, '
      f'including the copy made when it grows); {free / 2**30:.2f} GiB are free; {fix}.'
    )


def _free_bytes(mesh: Mesh) -> float:
  """Returns free bytes of each device of the mesh; infinite if the backend reports none."""
  device = mesh.local_devices[0]  # a process cannot ask for the memory of another's devices
  if device.platform == 'cpu':
    # The devices of a CPU share the memory of the host.
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / mesh.size
  stats = device.memory_stats() or {}
  return stats.get('bytes_limit', math.inf) - stats.get('bytes_in_use', 0)


def round_up(size: int, multiple: int) -> int:
  """Rounds up to a multiple."""
  return -(-size // multiple) * multiple


def _bucket(size: int, minimum: int) -> int:
  # Powers of two throughout would read up to twice the positions that are filled.
  return round_up(size, _STEP) if size > _STEP else max(_next_power_of_two(size), minimum)


def _next_power_of_two(size: int) -> int:
  return 1 << max(int(size) - 1, 0).bit_length()
