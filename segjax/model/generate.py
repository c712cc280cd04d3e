"""Responses to prompts, however long each: slots that take the next prompt as soon as one is done.

The host's part of decoding. What runs on the devices is `decode`.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax import processes
from segjax.errors import UserError
from segjax.model import decode, sharding
from segjax.model.decode import ChunkOutput, DecodeConfig, DecodeWeights
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.model.sampling import Sampling

_PREFILL_TOKENS = 1 << 16  # read at once, padding included
_UNROLLED = 16  # layers; of more, compiling them one by one takes too long
_SHRINK = 4  # slots become fewer by this factor once no prompt waits and so few are left


class GenerationResult(NamedTuple):
  """Responses on the host, padded on the right by the first stop id; N prompts times n samples.

  response_mask covers the stop token; `finished` says that there is one. `logprob` is that of the
  unfiltered distribution at temperature 1, as a full forward would give it; `sample_logprob` that
  of the distribution drawn from. A `broken` response ended because its logits were not finite.
  """

  response_ids: np.ndarray
  response_mask: np.ndarray
  finished: np.ndarray
  logprob: np.ndarray
  sample_logprob: np.ndarray
  broken: np.ndarray


@dataclasses.dataclass(frozen=True)
class PromptArrays:
  """Token ids int32 [N, P], padded on the right, and the length of each, [N]."""

  ids: np.ndarray
  length: np.ndarray


def make_decode_config(
  config: LlamaConfig, sampling: Sampling, stop_ids: tuple[int, ...], mesh: Mesh, chunk: int = 16
) -> DecodeConfig:
  """The decoder that suits the devices of the mesh.

  Raises:
    ValueError: a stop id is no token of the network.
  """
  for stop in stop_ids:
    if not 0 <= stop < config.vocab_size:
      raise UserError(
        f'stop id {stop} is outside the vocabulary of {config.vocab_size}; the tokenizer is not '
        'that of the network.'
      )
  return DecodeConfig(
    config=dataclasses.replace(config, remat='none'),
    sampling=sampling,
    stop_ids=tuple(stop_ids),
    chunk=min(chunk, sampling.max_new_tokens),
    unrolled=mesh.devices.flat[0].platform == 'cpu' and config.num_hidden_layers <= _UNROLLED,
    layout=sharding.decode_layout(config.num_key_value_heads, mesh),
  )


def generate(
  params: Any,
  prompts: PromptArrays,
  key: jax.Array,
  *,
  decoder: DecodeConfig,
  mesh: Mesh,
  slots: int = 0,
  samples: int = 1,
  index: np.ndarray | None = None,
  limits: np.ndarray | None = None,
  watch: Callable[[GenerationResult], object] = lambda found: None,
) -> GenerationResult:
  """Samples responses until a stop token or the limit.

  The random numbers of a response are uniform(fold_in(fold_in(fold_in(key, i), sample), t)) with i
  the prompt's index: they depend neither on other responses, nor on slots, nor on devices.

  Args:
    params: of the policy.
    prompts: what to answer.
    key: of this generation.
    decoder: see `make_decoder`.
    mesh: the devices.
    slots: responses under way at once; 0 for all.
    samples: responses per prompt; they share one reading of it.
    index: of each prompt, [N], for the random numbers; 0 to N - 1 if not given.
    limits: tokens that each response may have, [N samples]; sampling.max_new_tokens if not given.
    watch: is given all that has come out before every chunk of tokens; what it raises ends the
      generation.

  Returns:
    Responses in the order of the prompts, samples of one prompt next to each other.

  Raises:
    ValueError: an empty prompt, one that leaves no room, or a cache that does not fit.
  """
  _check(prompts, decoder)
  _check_memory(slots or len(prompts.ids) * samples, prompts, decoder, mesh)
  with jax.set_mesh(mesh):
    weights = decode.decode_weights(params, decoder=decoder)
    index = np.arange(len(prompts.ids)) if index is None else index
    keys = _response_keys(key, jnp.asarray(index, jnp.uint32), samples)
    run = _Scheduler(weights, prompts, keys, decoder, mesh, samples, limits)
    run.start(slots or len(run.limits))
    while run.is_busy:
      watch(run.found)
      run.refill()
      run.fit()
      run.step()
  return run.found


class _Scheduler:
  """A generation under way: which response is in which slot, and what has come out."""

  def __init__(
    self,
    weights: DecodeWeights,
    prompts: PromptArrays,
    keys: jax.Array,
    decoder: DecodeConfig,
    mesh: Mesh,
    samples: int,
    limits: np.ndarray | None,
  ):
    self._weights, self._prompts, self._decoder = weights, prompts, decoder
    self._rows = sharding.decode_rows(decoder.layout, mesh)
    self._samples = samples
    total, most = len(prompts.ids) * samples, decoder.sampling.max_new_tokens
    self.limits = np.full(total, most) if limits is None else np.minimum(limits, most)
    self._keys = keys
    self._next = 0  # the first response that no slot has taken
    size = (total, most)
    self.found = GenerationResult(
      response_ids=np.full(size, decoder.stop_ids[0], np.int32),
      response_mask=np.zeros(size, bool),
      finished=np.zeros(total, bool),
      logprob=np.zeros(size, np.float32),
      sample_logprob=np.zeros(size, np.float32),
      broken=np.zeros(total, bool),
    )
    self._count = np.zeros(total, int)  # tokens of each response so far

  def start(self, slots: int) -> None:
    """Makes the slots, at most as many as there are responses."""
    slots = _round_up(min(slots, len(self.limits)), self._rows)
    longest = int(self._prompts.length.max())
    self._positions = _bucket(longest + self._decoder.chunk)
    self._slots = decode.empty_slots(slots, self._positions, decoder=self._decoder)
    self._response = np.full(slots, -1)  # which one each slot holds; -1 for none

  @property
  def is_busy(self) -> bool:
    """Whether a response is under way or waits."""
    return self._next < len(self.limits) or bool((self._response >= 0).any())

  def refill(self) -> None:
    """Gives waiting responses to free slots."""
    free = np.flatnonzero(self._response < 0)
    taken = np.arange(self._next, min(self._next + len(free), len(self.limits)))
    self._next += len(taken)
    self._response[free[: len(taken)]] = taken
    prompts = np.unique(taken // self._samples)
    sizes = np.array([_bucket(int(n), least=16) for n in self._prompts.length[prompts]])
    for size in np.unique(sizes):
      group = prompts[sizes == size]
      most = max(_PREFILL_TOKENS // int(size), self._rows)
      for begin in range(0, len(group), most):
        self._insert(group[begin : begin + most], int(size), taken)

  def _insert(self, prompts: np.ndarray, size: int, taken: np.ndarray) -> None:
    """Reads these prompts, padded to `size`, and starts the responses among `taken` to them."""
    rows = _round_up(_next_power_of_two(len(prompts)), self._rows)
    padded = np.concatenate([prompts, np.repeat(prompts[:1], rows - len(prompts))])
    ids = self._prompts.ids[padded]
    ids = np.pad(ids, ((0, 0), (0, max(size - ids.shape[1], 0))))[:, :size]
    prefix = decode.prefill(
      self._weights,
      ids,
      self._prompts.length[padded].astype(np.int32),
      decoder=self._decoder,
    )
    held = np.maximum(self._response, 0)
    is_new = np.isin(self._response, taken) & np.isin(held // self._samples, prompts)
    source = np.where(is_new, np.searchsorted(prompts, held // self._samples), -1)
    self._grow(size)
    self._slots = decode.insert_slots(
      self._slots,
      prefix,
      source.astype(np.int32),
      self.limits[held].astype(np.int32),
      self._keys[held],
      decoder=self._decoder,
    )

  def _grow(self, positions: int) -> None:
    if positions > self._positions:
      self._resize(None, positions)

  def fit(self) -> None:
    """As many positions as the longest response under way needs, and slots as there are ones."""
    live = self._response >= 0
    held = self._response[live]
    length = self._prompts.length[held // self._samples] + self._count[held]
    positions = _bucket(int(length.max()) + self._decoder.chunk)
    rows, slots = None, len(self._response)
    fewer = _round_up(-(-slots // _SHRINK), self._rows)
    if self._next == len(self.limits) and live.sum() <= fewer < slots and slots > _LEAST:
      rows = np.argsort(~live, kind='stable')[:fewer]
    if positions != self._positions or rows is not None:
      self._resize(rows, positions)

  def _resize(self, rows: np.ndarray | None, positions: int) -> None:
    self._slots = decode.resize_slots(self._slots, rows, positions, decoder=self._decoder)
    self._positions = positions
    if rows is not None:
      self._response = self._response[rows]

  def step(self) -> None:
    """A chunk of tokens for every slot."""
    self._slots, tokens = decode.decode_chunk(self._weights, self._slots, decoder=self._decoder)
    tokens, live = processes.to_host((tokens, self._slots.live))
    self._record(tokens)
    self._response[~live] = -1

  def _record(self, tokens: ChunkOutput) -> None:
    slots = np.flatnonzero(self._response >= 0)
    response = self._response[slots]
    count = tokens.count[slots]
    step = np.arange(tokens.ids.shape[1])
    is_real = step < count[:, None]
    row = np.broadcast_to(response[:, None], is_real.shape)[is_real]
    column = (self._count[response][:, None] + step)[is_real]
    self.found.response_mask[row, column] = True
    for name, values in (
      ('response_ids', tokens.ids),
      ('logprob', tokens.logprob),
      ('sample_logprob', tokens.sample_logprob),
    ):
      getattr(self.found, name)[row, column] = values[slots][is_real]
    self.found.finished[response] = tokens.finished[slots]
    self.found.broken[response] = tokens.broken[slots]
    self._count[response] += count


_LEAST = 16  # slots below which fewer are not worth another program


@functools.partial(jax.jit, static_argnums=2)
def _response_keys(key: jax.Array, index: jax.Array, samples: int) -> jax.Array:
  """The key of every response, [N samples]."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  of_prompt = fold(key, index)
  return jax.vmap(fold, (0, None))(of_prompt, jnp.arange(samples)).reshape(-1)


def _check(prompts: PromptArrays, decoder: DecodeConfig) -> None:
  if not (prompts.length > 0).all():
    row = int(np.argmin(prompts.length))
    raise UserError(f'prompt {row} is empty; there is nothing to answer.')
  most = decoder.config.max_position_embeddings - decoder.sampling.max_new_tokens
  if prompts.length.max() > most:
    row = int(np.argmax(prompts.length))
    raise UserError(
      f'prompt {row} has {prompts.length[row]} tokens; with responses of up to '
      f'{decoder.sampling.max_new_tokens} the network has room for {most}.'
    )


def _check_memory(slots: int, prompts: PromptArrays, decoder: DecodeConfig, mesh: Mesh) -> None:
  """ValueError, with the number of slots that would do, where weights and cache cannot fit.

  While the cache grows to its last size, that before is there too.
  """
  c = decoder.config
  before, last = cache_positions(int(prompts.length.max()), decoder)
  positions = last + before
  itemsize = jnp.dtype(c.dtype).itemsize
  per_position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize
  per_slot = positions * per_position // mesh.size  # of each device
  weights = num_parameters(c) * itemsize * mesh.shape['data'] // mesh.size
  free = _free_bytes(mesh)
  if weights + slots * per_slot > free:
    fits = max(int((free - weights) // per_slot), 0)
    advice = f'set config.rollout.max_concurrent to at most {fits}' if fits else 'use more devices'
    raise UserError(
      f'the weights for decoding and a cache of {slots} slots of {last} positions, counting that '
      f'it grows, take {weights / 2**30:.2f} + {slots * per_slot / 2**30:.2f} GiB of each device, '
      f'which has {free / 2**30:.2f} GiB free; {advice}.'
    )


def cache_positions(longest: int, decoder: DecodeConfig) -> tuple[int, int]:
  """(Positions of the cache before it grows for the last time, and after) for such prompts.

  The first is 0 where it does not have to grow.
  """
  most = decoder.sampling.max_new_tokens
  first, last = (_bucket(longest + length + decoder.chunk) for length in (0, most))
  return (max(first, _bucket_before(last)) if first < last else 0), last


def prefill_rows(prompts: int, length: int, decoder: DecodeConfig, mesh: Mesh) -> tuple[int, int]:
  """(Rows, positions) of the largest prefill of so many prompts of that length."""
  size, rows = _bucket(length, least=16), sharding.decode_rows(decoder.layout, mesh)
  most = max(_PREFILL_TOKENS // size, rows)
  return _round_up(_next_power_of_two(min(prompts, most)), rows), size


def _free_bytes(mesh: Mesh) -> float:
  """Memory that each device of the mesh still has; infinite where nobody says."""
  device = mesh.local_devices[0]
  if device.platform == 'cpu':
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / mesh.size
  stats = device.memory_stats() or {}
  return stats.get('bytes_limit', math.inf) - stats.get('bytes_in_use', 0)


def _bucket(size: int, least: int = 64) -> int:
  """The next of few sizes, so that few programs are compiled: powers of two, then steps of 512."""
  if size > 512:
    return _round_up(size, 512)
  return max(_next_power_of_two(size), least)


def _bucket_before(size: int) -> int:
  """The largest bucket below the bucket `size`."""
  return size - 512 if size > 512 else size // 2


def _next_power_of_two(size: int) -> int:
  """The next power of two."""
  return 1 << max(int(size) - 1, 0).bit_length()


def _round_up(size: int, unit: int) -> int:
  return -(-size // unit) * unit
