"""Responses to prompts by continuous batching: a finished response's slot takes the next prompt.

The host's part of decoding. The programs that run on the devices are in `decode`, their sizes in
`decode_sizes`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax import processes
from segjax.errors import UserError
from segjax.model import decode, decode_sizes, sharding
from segjax.model.decode import ChunkOutput, DecodeConfig, DecodeWeights
from segjax.model.decode_weights import decode_weights, runs_unrolled
from segjax.model.llama import LlamaConfig
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

_SHRINK = 4  # factor by which the slots shrink once no prompt waits
_MIN_SHRINK = 16  # slots; a program for fewer would not pay for its compilation


class GenerationResult(NamedTuple):
  """Responses on the host, padded on the right by the first stop id; numpy, [N samples, T].

  Attributes:
    response_mask: True on the response, stop token included.
    finished: whether the response ended in a stop token, [N samples].
    logprob: under the unfiltered distribution at temperature 1, as a full forward would give it.
    sample_logprob: under the distribution drawn from.
    non_finite: whether the response ended because its logits were not finite, [N samples].
  """

  response_ids: np.ndarray
  response_mask: np.ndarray
  finished: np.ndarray
  logprob: np.ndarray
  sample_logprob: np.ndarray
  non_finite: np.ndarray


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
  """What may differ from one generation to the next without another program.

  Attributes:
    max_concurrent: responses decoded at once; 0 for all.
    samples_per_prompt: responses to each prompt, which is prefilled once for all that start
      together.
    prompt_index: number of each prompt, [N], for its random numbers; None counts from 0.
    limits: maximum tokens of each response, [N samples]; None is sampling.max_new_tokens for all.
  """

  max_concurrent: int = 0
  samples_per_prompt: int = 1
  prompt_index: np.ndarray | None = None
  limits: np.ndarray | None = None


_DEFAULT_OPTIONS = GenerationOptions()


def make_decode_config(
  config: LlamaConfig, sampling: Sampling, stop_ids: tuple[int, ...], mesh: Mesh, chunk: int = 16
) -> DecodeConfig:
  """Returns the decode configuration for a network on the devices of the mesh.

  Raises:
    UserError: a stop id is outside the vocabulary.
  """
  for stop in stop_ids:
    if not 0 <= stop < config.vocab_size:
      raise UserError(
        f'stop id {stop} is outside the vocabulary of {config.vocab_size}; use the tokenizer of '
        'the network.'
      )
  return DecodeConfig(
    config=dataclasses.replace(config, remat='none'),  # one program for any remat
    sampling=sampling,
    stop_ids=tuple(stop_ids),
    chunk=min(chunk, sampling.max_new_tokens),  # the rest of the buffer would stay empty
    unrolled=runs_unrolled(mesh.devices.flat[0].platform, config.num_hidden_layers),
    layout=sharding.decode_layout(config.num_key_value_heads, mesh),
  )


def generate(
  params: Any,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  decoder: DecodeConfig,
  mesh: Mesh,
  options: GenerationOptions = _DEFAULT_OPTIONS,
  on_chunk: Callable[[GenerationResult], object] = lambda result: None,
) -> GenerationResult:
  """Samples responses until a stop token or the limit.

  The random numbers of a response are uniform(fold_in(fold_in(fold_in(key, i), sample), t)) with i
  the prompt's index: they depend neither on other responses, nor on slots, nor on devices.

  Args:
    params: of the policy.
    prompts: N prompts on the host, numpy.
    key: of this generation.
    decoder: see `make_decode_config`.
    mesh: the devices.
    options: see `GenerationOptions`.
    on_chunk: called before every chunk with the tokens so far; an exception from it ends the
      generation.

  Returns:
    Responses in the order of the prompts, samples of one prompt next to each other.

  Raises:
    UserError: a prompt is empty or leaves no room for a response, or the cache does not fit.
  """
  decode_sizes.check_prompts(prompts.prompt_length, decoder)
  num_prompts, samples = len(prompts.prompt_ids), options.samples_per_prompt
  slots = options.max_concurrent or num_prompts * samples
  decode_sizes.check_memory(slots, int(prompts.prompt_length.max()), decoder, mesh)
  index = np.arange(num_prompts) if options.prompt_index is None else options.prompt_index
  # `sharding.constrain` reads the mesh from this context while the programs are traced.
  with jax.set_mesh(mesh):
    weights = decode_weights(params, decoder=decoder)
    keys = _response_keys(key, jnp.asarray(index, jnp.uint32), samples)
    scheduler = _Scheduler(weights, prompts, keys, options, decoder, mesh)
    while scheduler.is_busy:
      on_chunk(scheduler.result)
      scheduler.refill()
      scheduler.fit()  # after refill: the new prompts count too
      scheduler.step()
  return scheduler.result


class _Scheduler:
  """Continuous batching: assigns responses to slots and collects their tokens.

  Responses are numbered; response r answers prompt r // samples. A slot holds a response until it
  is finished, then the next one that waits, so that no slot idles until the longest of a batch is
  done.
  """

  def __init__(
    self,
    weights: DecodeWeights,
    prompts: PromptBatch,
    keys: jax.Array,
    options: GenerationOptions,
    decoder: DecodeConfig,
    mesh: Mesh,
  ):
    self._weights, self._prompts, self._keys = weights, prompts, keys
    self._decoder = decoder
    self._samples = options.samples_per_prompt
    self._multiple = sharding.decode_rows(decoder.layout, mesh)  # of slots and prefill rows
    self._total = len(prompts.prompt_ids) * self._samples
    max_tokens = decoder.sampling.max_new_tokens
    limits = max_tokens if options.limits is None else np.minimum(options.limits, max_tokens)
    self._limits = np.broadcast_to(limits, self._total)
    self._next = 0  # the first response that has not been assigned to a slot
    self._count = np.zeros(self._total, int)  # tokens of each response so far
    self.result = _empty_result(self._total, max_tokens, decoder.stop_ids[0])
    slots = min(options.max_concurrent or self._total, self._total)
    slots = decode_sizes.round_up(slots, self._multiple)  # rows are split only if they divide
    # For the shortest responses; `fit` grows the cache when a response needs it.
    longest = int(prompts.prompt_length.max())
    self._positions = decode_sizes.cache_bucket(longest + decoder.chunk)
    self._slots = decode.empty_slots(slots, self._positions, decoder=decoder)
    self._response = np.full(slots, -1)  # the response in each slot; -1 if it is free

  @property
  def is_busy(self) -> bool:
    """Whether a response is unfinished or waits for a slot."""
    return self._next < self._total or bool((self._response >= 0).any())

  def refill(self) -> None:
    """Assigns waiting responses to free slots, and prefills their prompts."""
    free = np.flatnonzero(self._response < 0)
    new = np.arange(self._next, min(self._next + len(free), self._total))
    self._next += len(new)
    self._response[free[: len(new)]] = new
    # Samples of one prompt are numbered in a row: those that start together share a prefill.
    prompts = np.unique(new // self._samples)
    lengths = self._prompts.prompt_length[prompts]
    sizes = np.array([decode_sizes.prompt_bucket(int(n)) for n in lengths])
    # Prompts of one bucket together: a short prompt is not padded to the longest.
    for size in np.unique(sizes):
      group = prompts[sizes == size]
      step = decode_sizes.max_prefill_prompts(int(size), self._multiple)
      for begin in range(0, len(group), step):
        self._insert(group[begin : begin + step], int(size), new)

  def _insert(self, prompts: np.ndarray, size: int, new: np.ndarray) -> None:
    """Prefills prompts, padded to `size` positions, and starts those `new` responses to them."""
    rows = decode_sizes.prefill_rows(len(prompts), self._multiple)
    # The first prompt fills up the rows; `source` below never points to the copies.
    padded = np.concatenate([prompts, np.repeat(prompts[:1], rows - len(prompts))])
    ids = self._prompts.prompt_ids[padded]
    ids = np.pad(ids, ((0, 0), (0, max(size - ids.shape[1], 0))))[:, :size]
    lengths = self._prompts.prompt_length[padded].astype(np.int32)
    prefilled = decode.prefill(self._weights, ids, lengths, decoder=self._decoder)
    response = np.maximum(self._response, 0)  # a valid index for free slots too
    prompt = response // self._samples
    # Not by prompt alone: other samples of it may be under way, and free slots show response 0.
    is_new = np.isin(self._response, new) & np.isin(prompt, prompts)
    source = np.where(is_new, np.searchsorted(prompts, prompt), -1)
    # `fit` may have shrunk the cache below this bucket, and `insert_slots` does not grow it.
    if size > self._positions:
      self._resize(None, size)
    self._slots = decode.insert_slots(
      self._slots,
      prefilled,
      source.astype(np.int32),
      self._limits[response].astype(np.int32),
      self._keys[response],
      decoder=self._decoder,
    )

  def fit(self) -> None:
    """Fits the cache to the longest unfinished response, and the slots to the number of these.

    A step reads the whole cache, so positions and slots that no response needs cost time.
    """
    active = self._response >= 0
    response = self._response[active]
    # Counted on the host: `length` on the devices would cost a transfer.
    length = self._prompts.prompt_length[response // self._samples] + self._count[response]
    # Room for a full chunk: a slice update that begins too late is clamped, without an error, and
    # would overwrite older tokens.
    positions = decode_sizes.cache_bucket(int(length.max()) + self._decoder.chunk)
    rows, slots = None, len(self._response)
    fewer = decode_sizes.round_up(-(-slots // _SHRINK), self._multiple)
    # Not while prompts wait: `refill` is about to use the free slots.
    if self._next == self._total and active.sum() <= fewer < slots and slots > _MIN_SHRINK:
      rows = np.argsort(~active, kind='stable')[:fewer]  # active slots first, in order
    if positions != self._positions or rows is not None:
      self._resize(rows, positions)

  def _resize(self, rows: np.ndarray | None, positions: int) -> None:
    self._slots = decode.resize_slots(self._slots, rows, positions, decoder=self._decoder)
    self._positions = positions
    if rows is not None:
      self._response = self._response[rows]

  def step(self) -> None:
    """Decodes a chunk of tokens for every slot and frees the slots of finished responses."""
    self._slots, output = decode.decode_chunk(self._weights, self._slots, decoder=self._decoder)
    # One transfer per chunk: the host learns which responses are finished.
    output, active = processes.to_host((output, self._slots.active))
    self._record(output)
    self._response[~active] = -1  # finished, or at its limit

  def _record(self, output: ChunkOutput) -> None:
    """Copies the tokens of a chunk from slots to responses."""
    slots = np.flatnonzero(self._response >= 0)
    response = self._response[slots]
    count = output.count[slots]
    step = np.arange(output.ids.shape[1])
    is_real = step < count[:, None]
    row = np.broadcast_to(response[:, None], is_real.shape)[is_real]
    column = (self._count[response][:, None] + step)[is_real]
    self.result.response_mask[row, column] = True
    for name, values in (
      ('response_ids', output.ids),
      ('logprob', output.logprob),
      ('sample_logprob', output.sample_logprob),
    ):
      getattr(self.result, name)[row, column] = values[slots][is_real]
    self.result.finished[response] = output.finished[slots]
    self.result.non_finite[response] = output.non_finite[slots]
    self._count[response] += count


def _empty_result(responses: int, tokens: int, fill: int) -> GenerationResult:
  return GenerationResult(
    response_ids=np.full((responses, tokens), fill, np.int32),
    response_mask=np.zeros((responses, tokens), bool),
    finished=np.zeros(responses, bool),
    logprob=np.zeros((responses, tokens), np.float32),
    sample_logprob=np.zeros((responses, tokens), np.float32),
    non_finite=np.zeros(responses, bool),
  )


@functools.partial(jax.jit, static_argnums=2)
def _response_keys(key: jax.Array, index: jax.Array, samples: int) -> jax.Array:
  """Returns the key of every response, [N samples]."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  prompt_keys = fold(key, index)
  return jax.vmap(fold, (0, None))(prompt_keys, jnp.arange(samples)).reshape(-1)
