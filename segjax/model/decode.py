"""Decoding with a key/value cache: the jitted pieces that a host loop (`generate`) puts together.

A batch of slots, each with a response of its own age. `prefill` reads prompts, `insert` puts them
into free slots, `advance` draws a chunk of tokens for every slot, `resize` changes how many slots
there are and how many positions the cache has. Rows begin at position 0; nothing is padded on the
left.

The cache is in two parts. During a chunk the main part is only read, and what is new goes to a
small buffer, at the same place for all rows; at the end of the chunk it is moved over, to each
row's own place. So no step scatters, and none rewrites the cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.model import sharding
from segjax.model.attention import KeyValue
from segjax.model.llama import Block, LlamaConfig, RMSNorm
from segjax.model.sampling import Sampling, has_no_finite_logit, sample_token


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """What is fixed over a generation.

  Attributes:
    chunk: steps between two looks of the host.
    unrolled: layers one by one, each with a cache of its own, which CPUs like; else scanned, which
      compiles in a time that does not grow with their number.
    layout: a prefix in the table of `sharding`; see `decode_layout` there.
  """

  config: LlamaConfig
  sampling: Sampling
  stop_ids: tuple[int, ...]
  chunk: int = 16
  unrolled: bool = True
  layout: str = 'decode_'


class DecodeWeights(NamedTuple):
  """The policy's weights in the compute dtype, laid out for decoding; layers apart or stacked."""

  embedding: Float[Array, 'V D']
  layers: Any
  norm: Any
  head: Float[Array, 'D V']


class DecodeState(NamedTuple):
  """Responses under way, one per slot.

  Attributes:
    cache: keys and values of the tokens so far, per layer.
    length: how many of its positions are filled.
    logits: of the next token.
    count: tokens of the response so far.
    limit: how many it may have.
    key: the response's own random key.
    live: whether the slot holds a response that goes on.
  """

  cache: Any
  length: Int[Array, 'B']
  logits: Float[Array, 'B V']
  count: Int[Array, 'B']
  limit: Int[Array, 'B']
  key: Array
  live: Bool[Array, 'B']


class PrefilledPrompts(NamedTuple):
  """Prompts that were read: their keys and values, their lengths, the logits after each."""

  cache: Any
  length: Int[Array, 'R']
  logits: Float[Array, 'R V']


class ChunkOutput(NamedTuple):
  """What a chunk drew: the first `count` of each row; `broken` rows had no finite logits."""

  ids: Int[Array, 'B C']
  logprob: Float[Array, 'B C']
  sample_logprob: Float[Array, 'B C']
  count: Int[Array, 'B']
  finished: Bool[Array, 'B']
  broken: Bool[Array, 'B']


@functools.partial(jax.jit, static_argnames='decoder')
def decode_weights(params: dict[str, Any], *, decoder: DecodeConfig) -> DecodeWeights:
  """The parameters as `advance` reads them: cast and laid out once, not in every step."""
  params = jax.tree.map(lambda leaf: leaf.astype(decoder.config.dtype), params)
  params = sharding.decode_sharding(params)
  backbone = params['backbone']
  layers = backbone['layers']
  if decoder.unrolled:
    layers = tuple(
      jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      for i in range(decoder.config.num_hidden_layers)
    )
  tied = decoder.config.tie_word_embeddings
  head = backbone['embedding'].T if tied else params['lm_head']['kernel']
  return DecodeWeights(backbone['embedding'], layers, backbone['norm'], head)


@functools.partial(jax.jit, static_argnames='decoder')
def prefill(
  weights: DecodeWeights, ids: Int[Array, 'R P'], length: Int[Array, 'R'], *, decoder: DecodeConfig
) -> PrefilledPrompts:
  """Reads prompts, padded on the right."""
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
  block = Block(decoder.config, decoder.layout)

  def read(x, layer):
    return block.apply({'params': layer}, x, positions, method='prefill')

  x, cache = _through_layers(read, _embed(weights, ids, decoder), (weights.layers,), decoder)
  last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
  return PrefilledPrompts(
    _constrained(_finite(cache), decoder), length, _logits(weights, last, decoder)
  )


@functools.partial(jax.jit, static_argnames=('slots', 'positions', 'decoder'))
def empty_slots(slots: int, positions: int, *, decoder: DecodeConfig) -> DecodeState:
  """So many slots, all free, with room for so many positions."""
  c = decoder.config
  shape = (slots, c.num_key_value_heads, c.head_dim, positions)
  one = KeyValue(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype).swapaxes(2, 3))
  if decoder.unrolled:
    cache = (one,) * c.num_hidden_layers
  else:
    cache = jax.tree.map(lambda x: jnp.stack([x] * c.num_hidden_layers), one)
  zeros = jnp.zeros(slots, jnp.int32)
  wide = jnp.promote_types(c.dtype, jnp.float32)
  return DecodeState(
    cache=_constrained(cache, decoder),
    length=zeros,
    logits=jnp.zeros((slots, c.vocab_size), wide),
    count=zeros,
    limit=zeros,
    key=jax.random.split(jax.random.key(0), slots),
    live=zeros > 0,
  )


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='slots')
def insert_slots(
  slots: DecodeState,
  prefix: PrefilledPrompts,
  source: Int[Array, 'B'],
  limit: Int[Array, 'B'],
  key: Array,
  *,
  decoder: DecodeConfig,
) -> DecodeState:
  """Puts prompts into slots.

  Args:
    source: for each slot the row of `prefix` that it takes; -1 leaves it alone.
    limit: tokens that the new responses may have.
    key: the new responses' random keys, [B].
  """
  is_new = source >= 0
  row = jnp.maximum(source, 0)

  def put(old, prefixes, axis):
    """`axis` is that of the slots; positions are last in keys and last but one in values."""
    new = jnp.take(prefixes, row, axis=axis)
    begin = old[tuple(slice(size) for size in new.shape)]
    mask = is_new.reshape((1,) * axis + (-1,) + (1,) * (new.ndim - axis - 1))
    merged = jnp.where(jnp.broadcast_to(mask, new.shape), new.astype(old.dtype), begin)
    return jax.lax.dynamic_update_slice(old, merged, (0,) * old.ndim)

  axis = 0 if decoder.unrolled else 1
  cache = jax.tree.map(functools.partial(put, axis=axis), slots.cache, prefix.cache)

  def choose(new, old):
    return jnp.where(is_new, new, old)

  return DecodeState(
    cache=_constrained(cache, decoder),
    length=choose(prefix.length[row], slots.length),
    logits=jnp.where(is_new[:, None], prefix.logits[row], slots.logits),
    count=choose(0, slots.count),
    limit=choose(limit, slots.limit),
    key=choose(key, slots.key),
    live=is_new | slots.live,
  )


@functools.partial(jax.jit, static_argnames=('positions', 'decoder'))
def resize_slots(
  slots: DecodeState, rows: Int[Array, 'N'] | None, positions: int, *, decoder: DecodeConfig
) -> DecodeState:
  """The slots at `rows`, or all, with room for `positions`; whatever lies beyond is dropped.

  Layer after layer: rows that change their device are gathered, and no device has room for all.
  """

  def refit(x, position_axis):
    if rows is not None:
      x = jnp.take(x, rows, axis=0)
    x = jax.lax.slice_in_dim(x, 0, min(positions, x.shape[position_axis]), axis=position_axis)
    widths = [(0, 0)] * x.ndim
    widths[position_axis] = (0, positions - x.shape[position_axis])
    return jnp.pad(x, widths)

  def refit_layer(layer):
    refitted = KeyValue(refit(layer.key, 3), refit(layer.value, 2))
    return _laid_out(refitted, decoder, ())

  cache = slots.cache
  cache = tuple(map(refit_layer, cache)) if decoder.unrolled else jax.lax.map(refit_layer, cache)
  others = slots._replace(cache=None)
  if rows is not None:
    others = jax.tree.map(lambda x: x[rows], others)
  return others._replace(cache=_constrained(cache, decoder))


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='slots')
def decode_chunk(
  weights: DecodeWeights, slots: DecodeState, *, decoder: DecodeConfig
) -> tuple[DecodeState, ChunkOutput]:
  """Draws up to `decoder.chunk` tokens for every live slot."""
  block = Block(decoder.config, decoder.layout)
  stop = jnp.asarray(decoder.stop_ids, jnp.int32)
  size = decoder.chunk
  batch = slots.length.shape[0]
  none = jnp.zeros(batch, bool)

  def step(carry):
    j, logits, recent, live, tokens = carry
    broken = live & has_no_finite_logit(logits)
    drawing = live & ~broken
    uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(
      slots.key, slots.count + j
    )
    drawn = sample_token(logits, uniform, slots.count + j, stop, decoder.sampling)
    token = jnp.where(drawing, drawn.token, stop[0])
    finished = drawing & jnp.any(token[:, None] == stop[None], axis=1)
    tokens = ChunkOutput(
      tokens.ids.at[:, j].set(token),
      tokens.logprob.at[:, j].set(jnp.where(drawing, drawn.logprob, 0)),
      tokens.sample_logprob.at[:, j].set(jnp.where(drawing, drawn.sample_logprob, 0)),
      tokens.count + drawing,
      tokens.finished | finished,
      tokens.broken | broken,
    )
    live = drawing & ~finished & (slots.count + j + 1 < slots.limit)

    def layer(x, weights, main, recent):
      return block.apply(
        {'params': weights},
        x,
        (slots.length + j)[:, None],
        main,
        recent,
        slots.length,
        j,
        method='decode',
      )

    x = _embed(weights, token[:, None], decoder)
    x, recent = _through_layers(layer, x, (weights.layers, slots.cache, recent), decoder)
    return j + 1, _logits(weights, x, decoder), recent, live, tokens

  recent = _per_layer(functools.partial(_room, size=size), slots.cache)
  tokens = ChunkOutput(
    ids=jnp.full((batch, size), stop[0]),
    logprob=jnp.zeros((batch, size), slots.logits.dtype),
    sample_logprob=jnp.zeros((batch, size), slots.logits.dtype),
    count=jnp.zeros(batch, jnp.int32),
    finished=none,
    broken=none,
  )
  _, logits, recent, live, tokens = jax.lax.while_loop(
    lambda carry: (carry[0] < size) & jnp.any(carry[3]),
    step,
    (jnp.int32(0), slots.logits, recent, slots.live, tokens),
  )
  moved = slots._replace(
    cache=_constrained(_merged(slots.cache, recent, slots.length, decoder), decoder),
    length=slots.length + tokens.count,
    logits=logits,
    count=slots.count + tokens.count,
    live=live,
  )
  return moved, tokens


def _per_layer(function, cache):
  """The function of the keys and values of each layer, or of the stack of them."""
  return jax.tree.map(function, cache, is_leaf=lambda x: isinstance(x, KeyValue))


def _room(cache, size):
  """An empty cache of `size` positions beside another."""
  key, value = cache
  return KeyValue(
    jnp.zeros((*key.shape[:-1], size), key.dtype),
    jnp.zeros((*value.shape[:-2], size, value.shape[-1]), value.dtype),
  )


def _merged(cache, recent, length, decoder):
  """The cache with each row's recent part written behind its length."""
  update = jax.lax.dynamic_update_slice_in_dim
  recent = _finite(recent)

  def row(main, recent, at):
    return KeyValue(update(main.key, recent.key, at, 2), update(main.value, recent.value, at, 1))

  def layer(main, recent):
    return jax.vmap(row)(main, recent, length)

  if decoder.unrolled:
    return tuple(layer(*pair) for pair in zip(cache, recent, strict=True))
  return jax.vmap(layer)(cache, recent)


def _finite(cache):
  """0 in place of what is not finite: 0 times NaN would reach the row that has the slot next."""
  return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), cache)


def _through_layers(step, x, parts, decoder: DecodeConfig):
  """x through all layers, and what each returns; `parts` are the layers' arguments after x."""
  if not decoder.unrolled:
    return jax.lax.scan(lambda x, part: step(x, *part), x, parts)
  found = []
  for part in zip(*parts, strict=True):
    x, one = step(x, *part)
    found.append(one)
  return x, tuple(found)


def _embed(weights: DecodeWeights, ids, decoder: DecodeConfig):
  return sharding.constrain(weights.embedding[ids], f'{decoder.layout}hidden')


def _logits(weights: DecodeWeights, x, decoder: DecodeConfig):
  """[B, V], float32. Drawing looks at whole rows: the logits are gathered, never the head."""
  hidden = RMSNorm(decoder.config.rms_norm_eps).apply({'params': weights.norm}, x)
  logits = sharding.constrain(hidden @ weights.head, f'{decoder.layout}logits')[:, 0]
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return sharding.constrain(wide, f'{decoder.layout}tokens')


def _constrained(cache, decoder: DecodeConfig):
  stack = () if decoder.unrolled else (None,)
  return _per_layer(lambda layer: _laid_out(layer, decoder, stack), cache)


def _laid_out(layer: KeyValue, decoder: DecodeConfig, stack: tuple[None, ...]) -> KeyValue:
  return KeyValue(
    sharding.constrain(layer.key, f'{decoder.layout}key', stack),
    sharding.constrain(layer.value, f'{decoder.layout}value', stack),
  )
