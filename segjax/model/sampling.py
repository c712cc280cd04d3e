"""Samples a token from logits, with its log-probs before and after filtering.

Not here: the network and the loop over tokens (`decode`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 128  # of the vocabulary; the cumulative sum runs over blocks, then inside one
_HALVINGS = 24  # leaves 2^-24 of the largest probability, the precision of float32


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Parameters of sampling.

  temperature 0 is greedy; top_k 0 and top_p 1 filter nothing; stop tokens are
  banned before min_new_tokens tokens.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int = 1024


class SampledToken(NamedTuple):
  """A token per row; its log-prob unfiltered at temperature 1, and as it was drawn."""

  token: Int[Array, 'B']
  logprob: Float[Array, 'B']
  sample_logprob: Float[Array, 'B']


def sample_token(
  logits: Float[Array, 'B V'],
  uniform: Float[Array, 'B'],
  count: Int[Array, 'B'],
  stop: Int[Array, 'N'],
  sampling: Sampling,
) -> SampledToken:
  """Draws one token per row, exactly with the probabilities of the filtered softmax.

  Args:
    logits: of the next token, float32.
    uniform: one number in [0, 1) per row, the only source of randomness.
    count: tokens of the response so far.
    stop: the stop tokens.
    sampling: temperature and filters.
  """
  is_stop = jnp.zeros(logits.shape[-1], bool).at[stop].set(True)
  banned = is_stop[None] & (count < sampling.min_new_tokens)[:, None]
  allowed = jnp.where(banned, -jnp.inf, logits) if sampling.min_new_tokens else logits
  if sampling.temperature == 0:
    token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    # Drawn with probability 1, whose log is 0.
    return SampledToken(token, _picked(jax.nn.log_softmax(logits), token), jnp.zeros_like(uniform))
  filtered = filter_logits(allowed / sampling.temperature, sampling)
  # The largest weight is 1: the sum can neither overflow nor vanish.
  weights = jnp.exp(filtered - jnp.max(filtered, axis=-1, keepdims=True))
  # One uniform per row: V Gumbel numbers took 30 times as long on CPU (64 rows, V = 32,768).
  token = inverse_cdf(weights, uniform)
  return SampledToken(
    token,
    # Of the raw logits: training compares it with a full forward pass, which filters nothing.
    _picked(logits, token) - jax.nn.logsumexp(logits, axis=-1),
    _picked(filtered, token) - jax.nn.logsumexp(filtered, axis=-1),
  )


def inverse_cdf(weights: Float[Array, 'B V'], uniform: Float[Array, 'B']) -> Int[Array, 'B']:
  """Index at which the running sum of the weights passes uniform · Σ weights.

  First over blocks of the vocabulary, then inside one block: one pass over V and two short sums
  instead of a running sum over V. An index of weight 0 is never returned.
  """
  batch, size = weights.shape
  # The padding has weight 0 and is never drawn.
  blocks = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))).reshape(batch, -1, _BLOCK)
  sums = jnp.sum(blocks, axis=-1)
  above = jnp.cumsum(sums, axis=-1)
  target = uniform * above[:, -1]
  block = _first_above(above, sums, target)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  before = jnp.where(block > 0, _picked(above, jnp.maximum(block - 1, 0)), 0)
  index = _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)
  return (block * _BLOCK + index).astype(jnp.int32)


def _first_above(
  running: Float[Array, 'B N'], weights: Float[Array, 'B N'], target: Float[Array, 'B']
) -> Int[Array, 'B']:
  """First index with a weight at which the running sum is above target, else the last such one."""
  has_weight = weights > 0
  # XLA adds in a tree: a running sum may rise where the weight is 0, and fall short of the target.
  above = has_weight & (running > target[:, None])
  last = running.shape[1] - 1 - jnp.argmax(has_weight[:, ::-1], axis=1)
  return jnp.where(jnp.any(above, axis=1), jnp.argmax(above, axis=1), last)


def filter_logits(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Sets logits outside the top k and outside the nucleus of mass top_p to -inf.

  The nucleus comes from bisection on the probability threshold: no sort of the vocabulary.
  """
  if 0 < sampling.top_k < logits.shape[-1]:
    floor = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits >= floor, logits, -jnp.inf)  # equal logits all stay
  if sampling.top_p < 1:
    probs = jax.nn.softmax(logits, axis=-1)

    def halve(_, bounds):
      low, high = bounds  # the mass above `low` reaches top_p, that above `high` does not
      middle = (low + high) / 2
      enough = jnp.sum(jnp.where(probs >= middle, probs, 0), -1, keepdims=True) >= sampling.top_p
      return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    peak = jnp.max(probs, axis=-1, keepdims=True)
    # The upper bound lies above the peak, where no mass is. A sort took 30 times as long on CPU.
    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(peak), peak * 1.000001))
    logits = jnp.where(probs >= low, logits, -jnp.inf)  # `low`: the mass reaches top_p
  return logits


def has_no_finite_logit(logits: Float[Array, 'B V']) -> Bool[Array, 'B']:
  """True for rows that define no distribution: they have a NaN, or no finite logit."""
  # A maximum propagates NaN, and is -inf only if all logits are.
  return ~jnp.isfinite(jnp.max(logits, axis=-1))


def _picked(x: Float[Array, 'B V'], index: Int[Array, 'B']) -> Float[Array, 'B']:
  return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]
