"""The product with the vocabulary, log-prob of a token and entropy in one function, piece by piece.

The vocabulary is cut, not the tokens: a device multiplies all its tokens by one piece of the kernel
after the other. One buffer [N, piece] of logits exists, sums over the vocabulary are carried as in
an online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867), and the float32
gradient of a piece of the kernel is complete when its piece is. With pieces of tokens, every piece
would gather, read and add to the gradient of the whole kernel.

The backward pass multiplies again. With p = softmax(l) and H its entropy,

  dlogits = g_logprob (onehot(y) - p) - g_entropy p (ln p + H).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from segjax.model.head_pieces import Pieces, gathered, head_layout, scattered
from segjax.model.llama import LlamaConfig


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_logprobs(
  hidden: Float[Array, 'B S D'],
  kernel: Float[Array, 'D V'],
  target: Int[Array, 'B S'],
  config: LlamaConfig,
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
  """Returns log-prob of `target` and entropy under softmax(hidden · kernel), nats.

  Both are at least float32 and equal those of `rl.logprobs.logprob_and_entropy` of the logits; a
  logit of −inf has probability 0. Products are multiplied in hidden's dtype and added up in at
  least float32, and so is the gradient of the kernel.

  On several devices each reads its own rows. Of the kernel it gathers one piece at a time, in
  hidden's dtype; split over `tensor`, devices exchange sums per token.

  Args:
    hidden: hidden states, laid out as 'hidden'.
    kernel: laid out as the head's parameter; so is the embedding, transposed.
    target: token ids in [0, V).
    config: of the network; `vocab_chunk`, the entries of the vocabulary in a piece, and
      `round_logits` are read.
  """
  return _forward(hidden, kernel, target, config)[:2]


def logit_product(
  hidden: Float[Array, 'N D'], kernel: Float[Array, 'D V'], rounded: bool = False
) -> Float[Array, 'N V']:
  """Returns hidden · kernel, multiplied in hidden's dtype, in at least float32.

  Args:
    rounded: rounds the product to hidden's dtype first. A logit of 20 has a gap of 1/8 to the next
      bfloat16, so the log-probs of two programs that add in another order differ.
  """
  logits = _product(hidden, kernel.astype(hidden.dtype))
  if not rounded or hidden.dtype != jnp.bfloat16:
    return logits
  # Not a cast there and back, which XLA may leave out.
  return jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)


def _product(x: Array, y: Array) -> Array:
  # Matrix units add in float32 anyway: this only keeps what they have.
  return jnp.matmul(x, y, preferred_element_type=_wide(x))


def _wide(x: Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)


class _Sums(NamedTuple):
  """What is known of softmax(l) once some of the vocabulary has been read, [N] each.

  Attributes:
    largest: m, at least the largest logit so far.
    weight: Σ e^(l - m).
    moment: Σ e^(l - m) (l - m).
    picked: the target's logit, 0 before it is read.
  """

  largest: Array
  weight: Array
  moment: Array
  picked: Array

  def relative_to(self, largest: Array) -> '_Sums':
    """Returns the sums with another m."""
    # −inf - (−inf), before any finite logit, is NaN; the sums are 0 then.
    change = jnp.where(jnp.isneginf(self.largest), 0, self.largest - largest)
    scale = jnp.exp(change)
    moment = scale * (self.moment + change * self.weight)
    return _Sums(largest, scale * self.weight, moment, self.picked)


def _sums_of_piece(
  logits: Float[Array, 'N piece'],
  largest: Float[Array, 'N'],
  target: Int[Array, 'N'],
  ids: Int[Array, '1 piece'],
) -> tuple[Float[Array, 'N'], ...]:
  """Returns weight, moment and picked of `_Sums`."""
  shifted = logits - largest[:, None]
  exponential = jnp.where(ids < 0, 0, jnp.exp(shifted))
  summands = (
    exponential,
    exponential * _finite(shifted),  # 0 · (−inf) would be NaN
    jnp.where(target[:, None] == ids, logits, 0),
  )

  def add(x, y):
    return tuple(a + b for a, b in zip(x, y, strict=True))

  # In one reduction: for each of three XLA on CPU makes a buffer of what is added up.
  return jax.lax.reduce(summands, (jnp.zeros((), logits.dtype),) * 3, add, (1,))


def _forward(hidden, kernel, target, config):
  """Returns log-prob, entropy, m of `_Sums` and ln Σ e^(l - m), [B, S] each."""
  layout = head_layout(hidden, kernel)

  def shard(hidden, kernel, target):
    pieces = Pieces(kernel, layout, config)
    x = gathered(hidden, layout.positions, 1).reshape(-1, hidden.shape[-1])
    y = target.reshape(-1)

    def step(i, sums):
      logits = logit_product(x, pieces.read(i, x.dtype), config.round_logits)
      sums = sums.relative_to(jnp.maximum(sums.largest, jnp.max(logits, axis=1)))
      added = _sums_of_piece(logits, _finite(sums.largest), y, pieces.ids(i))
      return _Sums(sums.largest, *(a + b for a, b in zip(sums[1:], added, strict=True)))

    zeros = jnp.zeros(len(x), _wide(x))
    sums = pieces.loop(step, _Sums(zeros - jnp.inf, zeros, zeros, zeros))
    if layout.vocabulary:
      sums = sums.relative_to(jax.lax.pmax(sums.largest, layout.vocabulary))
      sums = _Sums(sums.largest, *jax.lax.psum(tuple(sums[1:]), layout.vocabulary))
    normalizer = jnp.log(sums.weight)
    logprob = sums.picked - sums.largest - normalizer
    entropy = normalizer - sums.moment / sums.weight  # two terms of which none is negative
    return tuple(a.reshape(target.shape) for a in (logprob, entropy, sums.largest, normalizer))

  inputs = layout.hidden, layout.kernel, layout.tokens
  return layout.over_shards(shard, inputs, (layout.tokens,) * 4)(hidden, kernel, target)


def _saving_forward(hidden, kernel, target, config):
  # A frozen kernel, that of a base with adapters, needs no gradient: half of the backward pass.
  trained = () if kernel.perturbed else None
  hidden, kernel, target = hidden.value, kernel.value, target.value
  logprob, entropy, *normalizer = _forward(hidden, kernel, target, config)
  return (logprob, entropy), (trained, hidden, kernel, target, entropy, *normalizer)


def _backward(config, saved, gradients):
  """Returns the gradients of hidden and of a trained kernel; of target there is none."""
  trained, hidden, kernel, *of_tokens = saved
  is_trained = trained is not None
  layout = head_layout(hidden, kernel)
  of_logprob, of_entropy = gradients
  is_used = not isinstance(of_logprob, SymbolicZero)
  of_tokens.append(of_logprob if is_used else jnp.zeros_like(of_tokens[1]))
  if not isinstance(of_entropy, SymbolicZero):  # mostly the entropy is only reported
    of_tokens.append(of_entropy)

  def shard(hidden, kernel, *of_tokens):
    pieces = Pieces(kernel, layout, config)
    x = gathered(hidden, layout.positions, 1).reshape(-1, hidden.shape[-1])
    of_tokens = tuple(a.reshape(-1) for a in of_tokens)

    def step(i, carry):
      of_x, of_kernel = carry
      piece = pieces.read(i, x.dtype)
      logits = logit_product(x, piece, config.round_logits)
      of_logits = _of_logits(logits, pieces.ids(i), *of_tokens).astype(x.dtype)
      if is_trained:
        of_kernel = pieces.write(i, of_kernel, _product(x.T, of_logits))
      return of_x + _product(of_logits, piece.T), of_kernel

    zeros = jnp.zeros(x.shape, _wide(x))
    of_kernel = jnp.zeros(kernel.shape, _wide(x)) if is_trained else None
    of_x, of_kernel = pieces.loop(step, (zeros, of_kernel))
    of_x = of_x.astype(x.dtype).reshape(len(hidden), -1, hidden.shape[-1])
    of_x = jax.lax.psum(scattered(of_x, layout.positions, 1), layout.replicated)
    if is_trained:
      of_kernel = jax.lax.psum(of_kernel, layout.summed) / layout.copies
      of_kernel = of_kernel.astype(kernel.dtype)
    return of_x, of_kernel

  inputs = (layout.hidden, layout.kernel, *[layout.tokens] * len(of_tokens))
  outputs = layout.hidden, layout.kernel if is_trained else None
  mapped = layout.over_shards(shard, inputs, outputs)
  return *mapped(hidden, kernel, *of_tokens), None


fused_logprobs.defvjp(_saving_forward, _backward, symbolic_zeros=True)


def _of_logits(
  logits: Float[Array, 'N piece'],
  ids: Int[Array, '1 piece'],
  target: Int[Array, 'N'],
  entropy: Float[Array, 'N'],
  largest: Float[Array, 'N'],
  normalizer: Float[Array, 'N'],
  *of_outputs: Float[Array, 'N'],
) -> Float[Array, 'N piece']:
  """Returns the gradient of a piece of the logits; see the equation of the module.

  Args:
    of_outputs: gradients of log-prob and, unless it is zero, of the entropy.
  """
  # Subtracted one after the other: their sum would be rounded to a multiple of 1e-6.
  logprob = logits - _finite(largest)[:, None] - normalizer[:, None]
  of_logprob, *of_entropy = (x[:, None] for x in of_outputs)
  weight = of_logprob
  for gradient in of_entropy:
    weight = weight + gradient * (_finite(logprob) + entropy[:, None])
  of_target = jnp.where(target[:, None] == ids, of_logprob, 0)
  return of_target - jnp.where(ids < 0, 0, jnp.exp(logprob) * weight)


def _finite(x: Array) -> Array:
  """Returns x with 0 for −inf."""
  return jnp.where(jnp.isneginf(x), 0, x)
