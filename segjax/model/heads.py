"""Heads of the network: log-prob and entropy of tokens, or a scalar at every token.

The full [B, S, V] logits are never formed here, except by `logits`, which is for tests and
inspection. Parameters are plain nested dicts: {'backbone': ..., 'lm_head' or 'scalar_head': ...}.

Rows are one sequence each, padded on the right, unless a `llama.RowLayout` is given: then a
row may hold several sequences, each with positions from 0, or tokens of id 0, which no other token
sees (the attention masks of published runs; Yin et al. 2025, https://arxiv.org/abs/2501.02790).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.llama import UNPACKED, Llama, LlamaConfig, RowLayout
from segjax.rl.logprobs import logprob_and_entropy

HEADS = ('language', 'scalar')

Params = dict[str, Any]


class LanguageModel(nn.Module):
  """Backbone and the projection to the vocabulary, which is the embedding if weights are tied."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, ids: Int[Array, 'B S'], rows: RowLayout = UNPACKED) -> tuple[Array, Array]:
    """Hidden states [B, S, D] and the head's kernel [D, V]."""
    backbone = Llama(self.config, name='backbone')
    hidden = backbone(ids, rows)
    if self.config.tie_word_embeddings:
      return hidden, backbone.embedding.T
    return hidden, _Head(self.config.vocab_size, self.config.initializer_range, name='lm_head')(
      hidden.shape[-1]
    )


class ScalarModel(nn.Module):
  """Backbone and a bias-free scalar head: reward model or critic."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, ids: Int[Array, 'B S'], rows: RowLayout = UNPACKED) -> Float[Array, 'B S']:
    hidden = Llama(self.config, name='backbone')(ids, rows)
    width = hidden.shape[-1]
    kernel = _Head(1, 1 / (width + 1), name='scalar_head')(width)
    # In bfloat16 a score would be rounded by up to 0.4 % before scores are compared.
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return (hidden.astype(dtype) @ kernel.astype(dtype))[..., 0]


class _Head(nn.Module):
  features: int
  stddev: float

  @nn.compact
  def __call__(self, width: int) -> Array:
    # Only the parameter: `chunked_logprobs` computes the product in chunks.
    return self.param('kernel', nn.initializers.normal(self.stddev), (width, self.features))


def _module(config: LlamaConfig, head: str) -> nn.Module:
  if head not in HEADS:
    raise UserError(f'head={head!r} is not one of {HEADS}.')
  return LanguageModel(config) if head == 'language' else ScalarModel(config)


def init_params(key: Array, config: LlamaConfig, head: str) -> Params:
  """Draws parameters: N(0, initializer_range), the scalar head N(0, 1 / (D + 1))."""
  # The parameters do not depend on the length of these ids.
  return nn.unbox(_module(config, head).init(key, jnp.zeros((1, 2), jnp.int32)))['params']


def param_shapes(config: LlamaConfig, head: str) -> Params:
  """Returns the tree of parameter shapes; no parameter is allocated."""
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)  # a typed key has a dtype of its own
  return jax.eval_shape(functools.partial(init_params, config=config, head=head), key)


def scores(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S']:
  """The scalar head read AT each token, float32: a reward model's score of the text so far."""
  return ScalarModel(config).apply({'params': params}, ids, rows)


def values(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S']:
  """The scalar head read at the state BEFORE each token, float32; 0 for a sequence's first."""
  score = scores(params, ids, config, rows)
  return _after_first(score[:, :-1], rows.positions)


def logits(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S V']:
  """All next-token logits, float32. For tests and inspection: the array is huge."""
  hidden, kernel = LanguageModel(config).apply({'params': params}, ids, rows)
  return project(hidden, kernel, config.round_logits)


def token_logprobs(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
  """log π(ids_t | ids_<t) and the entropy H_t of that distribution, nats, in one pass.

  Both are float32 and 0 at the first token of a sequence, which nothing predicts. The projection
  to the vocabulary runs in chunks of `config.logprob_chunk` positions, recomputed in the backward
  pass, so that one [B, chunk, V] array is the largest that ever exists.
  """
  hidden, kernel = LanguageModel(config).apply({'params': params}, ids, rows)
  # The state at t - 1 predicts token t; nothing follows the last state.
  logprob, entropy = chunked_logprobs(
    hidden[:, :-1], kernel, ids[:, 1:], config.logprob_chunk, config.round_logits
  )
  return _after_first(logprob, rows.positions), _after_first(entropy, rows.positions)


def _after_first(
  x: Float[Array, 'B _'], positions: Int[Array, 'B S'] | None
) -> Float[Array, 'B S']:
  """Shifts x, read at the state before each token, to that token; 0 where a sequence begins."""
  x = jnp.pad(x, ((0, 0), (1, 0)))  # a full row again: outputs are aligned with ids
  # The state before a sequence that is packed behind another belongs to that other sequence.
  return x if positions is None else jnp.where(positions == 0, 0, x)


def chunked_logprobs(
  hidden: Float[Array, 'B S D'],
  kernel: Float[Array, 'D V'],
  target: Int[Array, 'B S'],
  chunk: int,
  rounded: bool = False,
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
  """Log-prob of `target` and entropy under softmax(hidden kernel), in chunks along S."""
  # Gathered along fsdp once, in the compute dtype, instead of once per chunk; then widened again so
  # that the gradients of the chunks add up in float32.
  kernel = sharding.constrain(kernel.astype(hidden.dtype), 'head').astype(kernel.dtype)

  # Without the checkpoint the scan would stack the logits of all chunks for the backward pass.
  @jax.checkpoint
  def chunk_logprobs(hidden, target):
    return logprob_and_entropy(project(hidden, kernel, rounded), target)

  batch, length, width = hidden.shape
  if length <= chunk:
    return chunk_logprobs(hidden, target)
  # Chunks of one size share a compiled body; what is added here is cut off at the end.
  extra = -length % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0))).reshape(batch, -1, chunk, width)
  target = jnp.pad(target, ((0, 0), (0, extra))).reshape(batch, -1, chunk)
  # Chunks of positions, not of all tokens: those would gather rows from other devices.
  hidden = sharding.constrain(jnp.moveaxis(hidden, 1, 0), 'chunked_hidden')
  target = sharding.constrain(jnp.moveaxis(target, 1, 0), 'chunked_tokens')
  _, results = jax.lax.scan(lambda carry, xs: (carry, chunk_logprobs(*xs)), None, (hidden, target))
  return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in results)


def project(
  hidden: Float[Array, 'B S D'], kernel: Float[Array, 'D V'], rounded: bool = False
) -> Float[Array, 'B S V']:
  """Returns float32 logits of hidden states of any dtype, split over the vocabulary."""
  # One flat product, for the reason given in `llama.Linear`.
  logits = logit_product(hidden.reshape(-1, hidden.shape[-1]), kernel, rounded)
  return sharding.constrain(logits.reshape(*hidden.shape[:-1], -1), 'logits')


def logit_product(
  hidden: Float[Array, 'N D'], kernel: Float[Array, 'D V'], rounded: bool = False
) -> Float[Array, 'N V']:
  """Returns hidden · kernel, multiplied in hidden's dtype, in at least float32.

  Args:
    rounded: rounds the product to hidden's dtype first. A logit of 20 has a gap of 1/8 to the next
      bfloat16, so the log-probs of two programs that add in another order differ.
  """
  if hidden.dtype != jnp.bfloat16:
    return hidden @ kernel.astype(hidden.dtype)
  logits = _float32_product(hidden, kernel)
  # Not a cast there and back, which XLA may leave out.
  return jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7) if rounded else logits


@jax.custom_vjp
def _float32_product(hidden, kernel):
  # Matrix units add in float32 anyway: this only keeps what they have.
  return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _product_forward(hidden, kernel):
  return _float32_product(hidden, kernel), (hidden, kernel)


def _product_backward(saved, gradient):
  # JAX would multiply the float32 gradient: matrix units are slower in float32.
  hidden, kernel = saved
  gradient = gradient.astype(hidden.dtype)
  of_hidden = gradient @ kernel.astype(hidden.dtype).T
  of_kernel = jnp.matmul(hidden.T, gradient, preferred_element_type=jnp.float32)
  return of_hidden, of_kernel.astype(kernel.dtype)


_float32_product.defvjp(_product_forward, _product_backward)
