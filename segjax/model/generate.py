"""Responses to prompts: the scheduler on the host and the programs on the devices, put together.

The programs are in `decode`, their sizes in `decode_sizes`; which response is decoded when, and in
which pages, is up to `scheduler`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from segjax import processes
from segjax.config.conflicts import check_samples
from segjax.errors import StepAbortedError, UserError
from segjax.model import agreement, decode, decode_memory, decode_sizes
from segjax.model.decode import ChunkOutput, DecodeConfig, DecodeRows
from segjax.model.decode_cache import PrefillChunk
from segjax.model.decode_weights import decode_weights, runs_unrolled
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import decode_mesh
from segjax.model.paged_attention import prefix_blocks, select_paged_attention
from segjax.model.requests import GenerationResult, Request
from segjax.model.sampling import Sampling
from segjax.model.scheduler import Programs, Scheduler
from segjax.types import PromptBatch

COPIES = 32  # pages that a call copies


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
  """What may differ from one generation to the next without another program.

  Attributes:
    max_concurrent: responses decoded at once; 0 for as many as fit.
    samples_per_prompt: responses to each prompt, which share the pages of the prompt.
    prompt_index: number of each prompt, [N], for its random numbers; None counts from 0.
    limits: maximum tokens of each response, [N samples]; None is sampling.max_new_tokens for all.
    stop: see `generate_requests`.
  """

  max_concurrent: int = 0
  samples_per_prompt: int = 1
  prompt_index: np.ndarray | None = None
  limits: np.ndarray | None = None
  stop: Callable[[], bool] = lambda: False

  def __post_init__(self):
    check_samples(self.samples_per_prompt, self.max_concurrent, section='')


_DEFAULT_OPTIONS = GenerationOptions()


class Generated(NamedTuple):
  """The rows of `result` that are done, and the requests that are not, with their tokens."""

  result: GenerationResult
  done: np.ndarray
  unfinished: list[Request]


def make_decode_config(
  config: LlamaConfig,
  sampling: Sampling,
  stop_ids: tuple[int, ...],
  mesh: Mesh,
  chunk: int = 16,
  tensor: int = 0,
) -> DecodeConfig:
  """Returns the decode configuration for a network on the devices of the mesh.

  Args:
    config: the network.
    sampling: how a token is drawn.
    stop_ids: tokens that end a response.
    mesh: of training.
    chunk: see `DecodeConfig`.
    tensor: see `mesh.decode_mesh`.

  Raises:
    UserError: a stop id is outside the vocabulary, or `tensor` does not divide heads or devices.
  """
  for stop in stop_ids:
    if not 0 <= stop < config.vocab_size:
      raise UserError(
        f'stop id {stop} is outside the vocabulary of {config.vocab_size}; use the tokenizer of '
        'the network.'
      )
  _mesh(config, mesh, tensor)  # refuses a number that does not divide them
  platform = mesh.devices.flat[0].platform
  return DecodeConfig(
    config=dataclasses.replace(config, remat='none'),  # one program for any remat
    sampling=sampling,
    stop_ids=tuple(stop_ids),
    chunk=min(chunk, sampling.max_new_tokens),  # the rest of the buffer would stay empty
    unrolled=runs_unrolled(platform, config.num_hidden_layers),
    paged_attention=select_paged_attention(platform, config.dtype, config.head_dim),
    tensor=tensor,
  )


def _mesh(config: LlamaConfig, mesh: Mesh, tensor: int) -> Mesh:
  return decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads, tensor)


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
  the prompt's index: they depend neither on other responses, nor on rows, nor on devices.

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
    StepAbortedError: see `generate_requests`.
  """
  decode_sizes.check_prompts(prompts.prompt_length, decoder)
  requests = make_requests(prompts, decoder, options)
  longest = prompts.prompt_ids.shape[1]  # with padding: the same from one batch to the next
  return generate_requests(
    params,
    requests,
    key,
    longest=longest,
    decoder=decoder,
    mesh=mesh,
    max_concurrent=options.max_concurrent,
    stop=options.stop,
    on_chunk=on_chunk,
  ).result


def make_requests(
  prompts: PromptBatch, decoder: DecodeConfig, options: GenerationOptions
) -> list[Request]:
  """Returns a request for each response; see `generate`."""
  num_prompts, samples = len(prompts.prompt_ids), options.samples_per_prompt
  index = np.arange(num_prompts) if options.prompt_index is None else options.prompt_index
  max_tokens = decoder.sampling.max_new_tokens
  limits = max_tokens if options.limits is None else np.minimum(options.limits, max_tokens)
  limits = np.broadcast_to(limits, num_prompts * samples)
  ids = [np.asarray(row[:n]) for row, n in zip(*prompts, strict=True)]
  return [
    Request(
      ids[i // samples],
      i // samples,
      np.array([index[i // samples], i % samples], np.uint32),
      int(limits[i]),
    )
    for i in range(num_prompts * samples)
  ]


def generate_requests(
  params: Any,
  requests: list[Request],
  key: jax.Array,
  *,
  longest: int,
  decoder: DecodeConfig,
  mesh: Mesh,
  max_concurrent: int = 0,
  at_once: int | None = None,
  enough: int | None = None,
  on_chunk: Callable[[GenerationResult], object] = lambda result: None,
  stop: Callable[[], bool] = lambda: False,
) -> Generated:
  """Samples the responses to requests, until all are done or `enough` of them.

  Its parameters are what one generation depends on, and stay flat.

  Args:
    params: of the policy.
    requests: what to sample, in the order in which it starts.
    key: see `generate`.
    longest: maximum tokens of a prompt, from which sizes of programs follow.
    decoder: see `make_decode_config`.
    mesh: the devices.
    max_concurrent: see `GenerationOptions`.
    at_once: maximum of responses decoded at once where more would fit; None for all requests.
    enough: ends the generation once so many responses are done; None waits for all.
    on_chunk: see `generate`.
    stop: asked before every chunk whether this process wants to end the generation.

  Raises:
    StepAbortedError: a process wants to stop; all raise it after the same chunk.
  """
  mesh = _mesh(decoder.config, mesh, decoder.tensor)
  # Free memory is known once the programs before have ended; the first tokens come after them.
  jax.block_until_ready(params)
  prompts = {request.prompt: len(request.prompt_ids) for request in requests}
  size = decode_memory.settle_pool(
    decoder,
    mesh,
    responses=at_once or len(requests),
    longest=longest,
    mean_prompt=sum(prompts.values()) / max(len(requests), 1),
    max_concurrent=max_concurrent,
  )
  # `sharding.constrain` reads the mesh from this context while the programs are traced.
  with jax.set_mesh(mesh):
    programs = _DevicePrograms(params, size.pages, mesh, decoder, key, stop)
    scheduler = Scheduler(requests, programs, size, mesh.shape['data'], decoder)
    while scheduler.is_busy and (enough is None or scheduler.num_done < enough):
      on_chunk(scheduler.result)
      scheduler.refill()
      scheduler.step()
  return Generated(scheduler.result, scheduler.is_done, scheduler.unfinished())


class _DevicePrograms(Programs):
  """Calls the programs on the devices, and holds the weights and the pages there."""

  def __init__(
    self,
    params: Any,
    num_pages: int,
    mesh: Mesh,
    decoder: DecodeConfig,
    key: jax.Array,
    stop: Callable[[], bool],
  ):
    self._decoder, self._mesh, self._groups = decoder, mesh, mesh.shape['data']
    self._key, self._stop = jax.random.key_data(key), stop
    self._weights = decode_weights(params, decoder=decoder)
    self._pages = decode.empty_pages(self._groups, num_pages, decoder=decoder)

  def prefill(self, chunk: PrefillChunk) -> None:
    decoder = self._decoder
    blocks = prefix_blocks(chunk.rows, decoder.page_size, decoder.paged_attention)
    self._pages = decode.prefill(
      self._weights, self._pages, chunk, decoder=decoder, prefix_blocks=blocks
    )

  def copy_pages(self, copies: list[list[tuple[int, int]]]) -> None:
    # Calls of one size; page 0 is copied to itself where a group has fewer.
    for begin in range(0, max(map(len, copies)), COPIES):
      pairs = np.zeros((self._groups, COPIES, 2), np.int32)
      for group, each in zip(pairs, copies, strict=True):
        part = each[begin : begin + COPIES]
        group[: len(part)] = np.reshape(part, (-1, 2))
      self._pages = decode.copy_pages(
        self._pages, pairs[..., 0], pairs[..., 1], decoder=self._decoder
      )

  def decode(self, rows: DecodeRows, steps: int) -> ChunkOutput:
    wants_stop = self._stop()
    placed = agreement.place_flags(wants_stop, self._mesh)
    if placed is None and wants_stop:
      raise StepAbortedError
    self._pages, output = decode.decode_chunk(
      self._weights,
      self._pages,
      rows,
      np.int32(steps),
      self._key,
      placed,
      decoder=self._decoder,
    )
    # One transfer per chunk: the host learns which responses are finished.
    output = processes.to_host(output)
    if output.stop:
      raise StepAbortedError
    return output
