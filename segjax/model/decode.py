"""Decoding with a key/value cache: the jitted functions that the host loop in `generate` calls.

A batch of slots, each with a response of its own age. `prefill` reads prompts, `insert_slots` puts
them into free slots, `decode_chunk` samples a chunk of tokens for every slot, `resize_slots`
changes the number of slots and of cache positions. Rows begin at position 0; nothing is padded on
the left.

The cache is in two parts. During a chunk the main part is only read, and new keys and values go to
a small buffer, at the same position for all rows; at the end of the chunk the buffer is moved to
each row's own position. So no step scatters, and none rewrites the cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.model import heads, kv_cache, sharding
from segjax.model.kv_cache import Cache
from segjax.model.llama import Block, LlamaConfig, RMSNorm
from segjax.model.sampling import Sampling, has_no_finite_logit, sample_token


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static configuration of a generation; hashable, for jit.

  Attributes:
    chunk: steps between two returns to the host.
    unrolled: whether each layer is traced with a cache of its own, which runs faster on CPUs; else
      layers are scanned, and compile time does not grow with their number.
    layout: a prefix in the table of `sharding`; see `decode_layout` there.
  """

  config: LlamaConfig
  sampling: Sampling
  stop_ids: tuple[int, ...]
  chunk: int = 16
  unrolled: bool = True
  layout: str = 'decode_'


class DecodeWeights(NamedTuple):
  """The policy's weights in the compute dtype, laid out for decoding."""

  embedding: Float[Array, 'V D']
  layers: Any  # a tuple of layers where they are unrolled, else stacked
  norm: Any
  head: Float[Array, 'D V']


class DecodeState(NamedTuple):
  """Unfinished responses, one per slot.

  Attributes:
    cache: keys and values of prompt and response so far.
    length: number of filled cache positions.
    logits: of the next token.
    count: tokens of the response so far.
    limit: maximum of `count`.
    key: the response's own random key.
    active: whether the slot holds an unfinished response.
  """

  cache: Cache
  length: Int[Array, 'B']
  logits: Float[Array, 'B V']
  count: Int[Array, 'B']
  limit: Int[Array, 'B']
  key: Array
  active: Bool[Array, 'B']


class PrefilledPrompts(NamedTuple):
  """Keys and values of prompts, their lengths, and the logits after each."""

  cache: Cache
  length: Int[Array, 'R']
  logits: Float[Array, 'R V']


class ChunkOutput(NamedTuple):
  """The tokens of a chunk: the first `count` of each row are real."""

  ids: Int[Array, 'B C']
  logprob: Float[Array, 'B C']
  sample_logprob: Float[Array, 'B C']
  count: Int[Array, 'B']
  finished: Bool[Array, 'B']  # ended in a stop token
  non_finite: Bool[Array, 'B']  # ended in logits without a finite value


@functools.partial(jax.jit, static_argnames='decoder')
def prefill(
  weights: DecodeWeights, ids: Int[Array, 'R P'], length: Int[Array, 'R'], *, decoder: DecodeConfig
) -> PrefilledPrompts:
  """Runs the network over prompts that are padded on the right."""
  # Padding on the right: it moves no position, and causal attention hides it from the prompt.
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
  block = Block(decoder.config, decoder.layout)

  def run_layer(x, layer):
    return block.apply({'params': layer}, x, positions, method='prefill')

  x, cache = _through_layers(run_layer, _embed(weights, ids, decoder), (weights.layers,), decoder)
  # Logits of the last prompt token alone: those of all positions would be [R, P, V].
  last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
  # Keys of padding stay in the cache; `length` masks them until the response overwrites them.
  cache = kv_cache.constrain_cache(kv_cache.zero_non_finite(cache), decoder.layout)
  return PrefilledPrompts(cache, length, _logits(weights, last, decoder))


@functools.partial(jax.jit, static_argnames=('slots', 'positions', 'decoder'))
def empty_slots(slots: int, positions: int, *, decoder: DecodeConfig) -> DecodeState:
  """Returns `slots` free slots, each with a cache of `positions` positions."""
  c = decoder.config
  cache = kv_cache.empty_cache(c, slots, positions, stacked=not decoder.unrolled)
  zeros = jnp.zeros(slots, jnp.int32)
  wide = jnp.promote_types(c.dtype, jnp.float32)  # as in _logits: a loop must not change its carry
  return DecodeState(
    cache=kv_cache.constrain_cache(cache, decoder.layout),
    length=zeros,
    logits=jnp.zeros((slots, c.vocab_size), wide),
    count=zeros,
    limit=zeros,
    key=jax.random.split(jax.random.key(0), slots),  # replaced by insert_slots
    active=zeros > 0,
  )


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='slots')  # no second cache
def insert_slots(
  slots: DecodeState,
  prompts: PrefilledPrompts,
  source: Int[Array, 'B'],
  limit: Int[Array, 'B'],
  key: Array,
  *,
  decoder: DecodeConfig,
) -> DecodeState:
  """Starts responses to prefilled prompts in some of the slots.

  Args:
    source: for each slot the row of `prompts` that it takes; -1 leaves the slot as it is.
    limit: maximum number of tokens of the new responses.
    key: random keys of the new responses, [B].
  """
  is_new, row = source >= 0, jnp.maximum(source, 0)  # where -1, row 0 is gathered and not used
  # A gather with a mask over all slots: no shape depends on how many of them take a prompt.
  cache = kv_cache.insert_rows(slots.cache, prompts.cache, source)

  def choose(new, old):
    return jnp.where(is_new, new, old)

  return DecodeState(
    cache=kv_cache.constrain_cache(cache, decoder.layout),
    length=choose(prompts.length[row], slots.length),
    logits=jnp.where(is_new[:, None], prompts.logits[row], slots.logits),
    count=choose(0, slots.count),
    limit=choose(limit, slots.limit),
    key=choose(key, slots.key),
    active=is_new | slots.active,
  )


# Not donated: the new cache has another shape, so the old buffers could not be reused.
@functools.partial(jax.jit, static_argnames=('positions', 'decoder'))
def resize_slots(
  slots: DecodeState, rows: Int[Array, 'N'] | None, positions: int, *, decoder: DecodeConfig
) -> DecodeState:
  """Selects the slots at `rows` (all, if None) and gives their cache `positions` positions."""
  others = slots._replace(cache=None)
  if rows is not None:
    others = jax.tree.map(lambda x: x[rows], others)
  return others._replace(cache=kv_cache.resize_cache(slots.cache, rows, positions, decoder.layout))


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='slots')  # no second cache
def decode_chunk(
  weights: DecodeWeights, slots: DecodeState, *, decoder: DecodeConfig
) -> tuple[DecodeState, ChunkOutput]:
  """Samples up to `decoder.chunk` tokens for every active slot."""
  block = Block(decoder.config, decoder.layout)

  def step(carry):
    j, logits, recent, active, output = carry
    # Drawn from the logits of the step before: between chunks the state holds the logits of the
    # next token, and its cache includes the last one.
    token, active, output = _draw(j, logits, active, output, slots, decoder)

    def layer(x, weights, main, recent):
      position = (slots.length + j)[:, None]
      inputs = (x, position, main, recent, slots.length, j)
      return block.apply({'params': weights}, *inputs, method='decode')

    # Finished slots run along, since shapes are fixed: their tokens are not recorded, and
    # `length` does not count what they write.
    x = _embed(weights, token[:, None], decoder)
    # The main cache is only read in the loop; a step that wrote to it might copy it.
    x, recent = _through_layers(layer, x, (weights.layers, slots.cache, recent), decoder)
    return j + 1, _logits(weights, x, decoder), recent, active, output

  recent = kv_cache.empty_buffer(slots.cache, decoder.chunk)
  # Not a scan: the loop can end early, and nothing here is differentiated.
  _, logits, recent, active, output = jax.lax.while_loop(
    lambda carry: (carry[0] < decoder.chunk) & jnp.any(carry[3]),
    step,
    (jnp.int32(0), slots.logits, recent, slots.active, _empty_output(slots, decoder)),
  )
  # The only write to positions that differ by row: once per chunk, not in every step.
  cache = kv_cache.append(slots.cache, recent, slots.length)
  state = slots._replace(
    # The layout it had on entry: donated buffers cannot be reused for another.
    cache=kv_cache.constrain_cache(cache, decoder.layout),
    length=slots.length + output.count,
    logits=logits,
    count=slots.count + output.count,
    active=active,
  )
  return state, output


def _empty_output(slots: DecodeState, decoder: DecodeConfig) -> ChunkOutput:
  shape = (slots.length.shape[0], decoder.chunk)
  ids = jnp.full(shape, jnp.int32(decoder.stop_ids[0]))  # int32 with x64 too, as `token`
  zeros, no_row = jnp.zeros(shape, slots.logits.dtype), jnp.zeros(shape[0], bool)
  return ChunkOutput(ids, zeros, zeros, jnp.zeros(shape[0], jnp.int32), no_row, no_row)


def _draw(j, logits, active, output: ChunkOutput, slots: DecodeState, decoder: DecodeConfig):
  """Draws token j of the chunk: (token, slots still active, output with the token recorded)."""
  stop = jnp.asarray(decoder.stop_ids, jnp.int32)
  count = slots.count + j
  non_finite = active & has_no_finite_logit(logits)
  drawing = active & ~non_finite  # such a response ends; the others continue
  # Keyed by the response and its token, never by the slot: neither batch mates nor slots matter.
  uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(
    slots.key, count
  )
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
  return token, drawing & ~finished & (count + 1 < slots.limit), output


def _through_layers(step, x, arguments, decoder: DecodeConfig):
  """Runs `x, output = step(x, *arguments of a layer)` for all layers: (x, outputs)."""
  if not decoder.unrolled:
    # The cache as xs and ys: carried and indexed by layer it took 2 GiB more (8B, v5p chip).
    return jax.lax.scan(lambda x, layer: step(x, *layer), x, arguments)
  outputs = []
  for layer in zip(*arguments, strict=True):
    x, output = step(x, *layer)
    outputs.append(output)
  return x, tuple(outputs)


def _embed(weights: DecodeWeights, ids, decoder: DecodeConfig):
  # Each device looks ids up in its part of the vocabulary: the table is never gathered.
  return sharding.constrain(weights.embedding[ids], f'{decoder.layout}hidden')


def _logits(weights: DecodeWeights, x, decoder: DecodeConfig):
  """Returns float32 logits [B, V]."""
  hidden = RMSNorm(decoder.config.rms_norm_eps).apply({'params': weights.norm}, x)
  # Split by V first: if the product had complete rows, XLA might gather the head instead of them.
  logits = heads.logit_product(hidden[:, 0], weights.head, decoder.config.round_logits)
  logits = sharding.constrain(logits[:, None], f'{decoder.layout}logits')[:, 0]
  return sharding.constrain(logits, f'{decoder.layout}tokens')  # sampling needs complete rows
