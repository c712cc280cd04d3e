"""Generation: prefill, the decode loop with a key/value cache, sampling.

One jitted call from prompts to responses. Prompts are shifted to the right end of their rows
inside, so that all rows write the same cache slot; outside, everything is padded on the right.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.model import sharding
from segjax.model.heads import project
from segjax.model.llama import Block, Llama, LlamaConfig, layer_params


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn from the logits.

  temperature 0 takes the likeliest token; top_k 0 and top_p 1 filter nothing; stop tokens are
  banned before min_new_tokens tokens.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int = 1024


class Generated(NamedTuple):
  """Responses, padded on the right by the first stop id.

  response_mask covers the stop token; `finished` says that there is one. `logprob` is that of the
  unfiltered distribution at temperature 1, as a full forward would give it.
  """

  response_ids: Int[Array, 'B T']
  response_mask: Bool[Array, 'B T']
  finished: Bool[Array, 'B']
  logprob: Float[Array, 'B T']


class _Loop(NamedTuple):
  step: Int[Array, '']
  logits: Float[Array, 'B V']
  caches: tuple
  out: Generated


@functools.partial(jax.jit, static_argnames=('config', 'sampling', 'stop_ids'))
def generate(
  params: dict[str, Any],
  prompt_ids: Int[Array, 'B P'],
  prompt_length: Int[Array, 'B'],
  key: Array,
  *,
  config: LlamaConfig,
  sampling: Sampling,
  stop_ids: tuple[int, ...],
) -> Generated:
  """Samples a response to each prompt until a stop token or max_new_tokens.

  The random number of row b at step t is uniform(fold_in(fold_in(key, b), t)): it depends neither
  on the other rows nor on the number of devices.
  """
  params = sharding.gather_fsdp(jax.tree.map(lambda leaf: leaf.astype(config.dtype), params))
  batch, prompt_size = prompt_ids.shape
  pad = prompt_size - prompt_length
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  logits, caches = _prefill(params, prompt_ids, pad, config, sampling.max_new_tokens)
  layers = [layer_params(params['backbone'], i) for i in range(config.num_hidden_layers)]
  stop = jnp.asarray(stop_ids, jnp.int32)

  def body(loop: _Loop) -> _Loop:
    t, out = loop.step, loop.out
    token, logprob = _sample(loop.logits, keys, t, stop, sampling)
    live = ~out.finished
    token = jnp.where(live, token, stop[0])
    out = Generated(
      response_ids=out.response_ids.at[:, t].set(token),
      response_mask=out.response_mask.at[:, t].set(live),
      finished=out.finished | jnp.any(token[:, None] == stop[None], axis=1),
      logprob=out.logprob.at[:, t].set(jnp.where(live, logprob, 0.0)),
    )
    slot = prompt_size + t
    slots = jnp.arange(prompt_size + sampling.max_new_tokens)
    mask = (slots[None] >= pad[:, None]) & (slots <= slot)[None]
    x = _embed(params, token[:, None], config)
    caches = []
    for layer, cache in zip(layers, loop.caches, strict=True):
      x, cache = Block(config).apply(
        {'params': layer}, x, (slot - pad)[:, None], mask[:, None], cache, slot, method='decode'
      )
      caches.append(cache)
    return _Loop(t + 1, _last_logits(params, x, config), tuple(caches), out)

  size = (batch, sampling.max_new_tokens)
  empty = Generated(
    response_ids=jnp.full(size, stop_ids[0], jnp.int32),
    response_mask=jnp.zeros(size, bool),
    finished=jnp.zeros(batch, bool),
    logprob=jnp.zeros(size, logits.dtype),
  )
  loop = jax.lax.while_loop(
    lambda loop: (loop.step < sampling.max_new_tokens) & ~jnp.all(loop.out.finished),
    body,
    _Loop(jnp.int32(0), logits, caches, empty),
  )
  return loop.out


def _prefill(params, prompt_ids, pad, config, max_new_tokens):
  """Logits after each prompt, [B, V], and the caches with room for max_new_tokens."""
  size = prompt_ids.shape[1]
  slots = jnp.arange(size)
  # Right-align: slot s of a row holds its token s - pad; the wrapped-around tail is masked.
  ids = jnp.take_along_axis(prompt_ids, (slots[None] - pad[:, None]) % size, axis=1)
  real = slots[None] >= pad[:, None]
  mask = (slots[:, None] >= slots[None])[None] & real[:, None]
  positions = jnp.maximum(slots[None] - pad[:, None], 0)
  x = _embed(params, ids, config)
  room = ((0, 0), (0, max_new_tokens), (0, 0), (0, 0))

  caches = []
  for index in range(config.num_hidden_layers):
    layer = layer_params(params['backbone'], index)
    x, cache = Block(config).apply({'params': layer}, x, positions, mask, method='prefill')
    caches.append(tuple(sharding.constrain(jnp.pad(part, room), 'heads') for part in cache))
  return _last_logits(params, x[:, -1:], config), tuple(caches)


def _embed(params, ids, config):
  return Llama(config).apply({'params': params['backbone']}, ids, method='embed')


def _last_logits(params, x, config):
  hidden = Llama(config).apply({'params': params['backbone']}, x, method='finish')
  kernel = (
    params['backbone']['embedding'].T if config.tie_word_embeddings else params['lm_head']['kernel']
  )
  # Sampling looks at whole rows: the logits are gathered, never the kernel.
  return sharding.constrain(project(hidden, kernel)[:, 0], 'tokens')


def _sample(logits, keys, step, stop, sampling: Sampling):
  """A token per row, and its log-prob in the unfiltered distribution at temperature 1."""
  logprobs = jax.nn.log_softmax(logits)
  banned = jnp.zeros(logits.shape[-1], bool).at[stop].set(True) & (step < sampling.min_new_tokens)
  allowed = jnp.where(banned[None], -jnp.inf, logits)
  if sampling.temperature == 0:
    token = jnp.argmax(allowed, axis=-1)
  else:
    probs = jax.nn.softmax(filtered(allowed / sampling.temperature, sampling), axis=-1)
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
    cdf = jnp.cumsum(probs, axis=-1)
    token = jnp.argmax(cdf > draw[:, None] * cdf[:, -1:], axis=-1)
  token = token.astype(jnp.int32)
  return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def filtered(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Logits with -inf outside the top k and outside the nucleus of mass top_p.

  The nucleus is found by bisection on the probability threshold, without sorting the vocabulary.
  """
  if 0 < sampling.top_k < logits.shape[-1]:
    floor = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits >= floor, logits, -jnp.inf)
  if sampling.top_p < 1:
    probs = jax.nn.softmax(logits, axis=-1)

    def halve(_, bounds):
      low, high = bounds  # the mass above `low` reaches top_p, that above `high` does not
      middle = (low + high) / 2
      enough = jnp.sum(jnp.where(probs >= middle, probs, 0), -1, keepdims=True) >= sampling.top_p
      return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    peak = jnp.max(probs, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(peak), peak * 1.000001))
    logits = jnp.where(probs >= low, logits, -jnp.inf)
  return logits
