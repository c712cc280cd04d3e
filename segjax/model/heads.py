"""Heads of the network: log-prob and entropy of tokens, or a scalar at every token.

The full [B, S, V] logits are never formed here, except by `logits`, which is for tests and
inspection. Parameters are plain nested dicts: {'backbone': ..., 'lm_head' or 'scalar_head': ...},
and {'adapter': ...} of a network that has adapters, see `lora`.

Rows are one sequence each, padded on the right, unless a `llama.RowLayout` is given: then a
row may hold several sequences, each with positions from 0, or tokens of id 0, which no other token
sees (the attention masks of published runs; Yin et al. 2025, https://arxiv.org/abs/2501.02790).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.fused_head import fused_logprobs, logit_product
from segjax.model.llama import UNPACKED, Llama, LlamaConfig, RowLayout
from segjax.model.lora import ADAPTER, STACKED, adapter_shapes, backbone_variables, stack

HEADS = ('language', 'scalar')

Params = dict[str, Any]


class _Head(nn.Module):
  features: int
  stddev: float

  @nn.compact
  def __call__(self, width: int) -> Array:
    # Only the parameter: `fused_logprobs` computes the product in pieces.
    return self.param('kernel', nn.initializers.normal(self.stddev), (width, self.features))


class _Network(nn.Module):
  """Backbone and head, to draw their parameters."""

  config: LlamaConfig
  head: str

  @nn.compact
  def __call__(self, ids: Int[Array, 'B S']) -> None:
    width = Llama(self.config, name='backbone')(ids).shape[-1]
    if self.head == 'scalar':
      _Head(1, 1 / (width + 1), name='scalar_head')(width)
    elif not self.config.tie_word_embeddings:
      _Head(self.config.vocab_size, self.config.initializer_range, name='lm_head')(width)


def init_params(key: Array, config: LlamaConfig, head: str) -> Params:
  """Draws parameters: N(0, initializer_range), the scalar head N(0, 1 / (D + 1))."""
  if head not in HEADS:
    raise UserError(f'head={head!r} is not one of {HEADS}.')
  # The parameters do not depend on the length of these ids.
  return nn.unbox(_Network(config, head).init(key, jnp.zeros((1, 2), jnp.int32)))['params']


def param_shapes(config: LlamaConfig, head: str) -> Params:
  """Returns the tree of parameter shapes, of adapters too; no parameter is allocated."""
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)  # a typed key has a dtype of its own
  shapes = jax.eval_shape(functools.partial(init_params, config=config, head=head), key)
  if config.lora is None:
    return shapes
  return shapes | {ADAPTER: adapter_shapes(shapes['backbone']['layers'], config.lora)}


def hidden_states(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S D']:
  """The backbone's output at each token, which the functions `read_*` turn into theirs."""
  return Llama(config).apply(backbone_variables(params), ids, rows)


def shared_hidden_states(
  networks: Sequence[tuple[Params, LlamaConfig]],
  ids: Int[Array, 'B S'],
  rows: RowLayout = UNPACKED,
) -> tuple[Float[Array, 'B S D'], ...]:
  """`hidden_states` of n networks of one base, in one pass over its weights.

  Args:
    networks: parameters and config of each; the backbone of the first is read.
    ids: the tokens.
    rows: how they form sequences.
  """
  (params, config), n = networks[0], len(networks)
  if n == 1:
    return (hidden_states(params, ids, config, rows),)
  adapters = [(own, network.lora) for own, network in networks]
  shared = {'backbone': params['backbone'], ADAPTER: stack(adapters)}
  # Row i belongs to network i mod n: copies of a row are on its device.
  ids, rows = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (ids, rows))
  hidden = hidden_states(shared, ids, dataclasses.replace(config, lora=STACKED), rows)
  hidden = hidden.reshape(-1, n, *hidden.shape[1:])
  return tuple(sharding.constrain(hidden[:, i], 'hidden') for i in range(n))


def scores(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S']:
  """The scalar head read AT each token, float32: a reward model's score of the text so far."""
  return read_scores(hidden_states(params, ids, config, rows), params)


def read_scores(hidden: Float[Array, 'B S D'], params: Params) -> Float[Array, 'B S']:
  """Returns `scores` of hidden states."""
  # In bfloat16 a score would be rounded by up to 0.4 % before scores are compared.
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  hidden, head = hidden.astype(dtype), params['scalar_head']
  if 'hidden' in head:  # of others, see `score_head.ScoreHead`
    layer = head['hidden']
    hidden = jax.nn.relu(hidden @ layer['kernel'] + layer['bias'][None, None])
  score = (hidden @ head['kernel'].astype(dtype))[..., 0]
  return score + head['bias'][0] if 'bias' in head else score


def values(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S']:
  """The scalar head read at the state BEFORE each token, float32; 0 for a sequence's first."""
  return read_values(hidden_states(params, ids, config, rows), params, rows)


def read_values(
  hidden: Float[Array, 'B S D'], params: Params, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S']:
  """Returns `values` of hidden states."""
  return _after_first(read_scores(hidden, params)[:, :-1], rows.positions)


def logits(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> Float[Array, 'B S V']:
  """All next-token logits, float32. For tests and inspection: the array is huge."""
  hidden = hidden_states(params, ids, config, rows)
  return project(hidden, _vocabulary_kernel(params), config.round_logits)


def token_logprobs(
  params: Params, ids: Int[Array, 'B S'], config: LlamaConfig, rows: RowLayout = UNPACKED
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
  """log π(ids_t | ids_<t) and the entropy H_t of that distribution, nats, in one pass.

  Both are float32 and 0 at the first token of a sequence, which nothing predicts. The projection
  to the vocabulary runs in pieces of `config.vocab_chunk` entries, recomputed in the backward pass,
  so that one [B, S, piece] array is the largest that ever exists.
  """
  return read_logprobs(hidden_states(params, ids, config, rows), params, ids, config, rows)


def read_logprobs(
  hidden: Float[Array, 'B S D'],
  params: Params,
  ids: Int[Array, 'B S'],
  config: LlamaConfig,
  rows: RowLayout = UNPACKED,
) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
  """Returns `token_logprobs` of hidden states."""
  # The state at t - 1 predicts token t; nothing follows the last state, which stays all the same:
  # positions that divide over the devices need not move.
  target = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
  outputs = fused_logprobs(hidden, _vocabulary_kernel(params), target, config)
  logprob, entropy = (_after_first(x[:, :-1], rows.positions) for x in outputs)
  return logprob, entropy


def _vocabulary_kernel(params: Params) -> Float[Array, 'D V']:
  """Returns the kernel of the head to the vocabulary, which is the embedding if it is tied."""
  head = params.get('lm_head')
  return params['backbone']['embedding'].T if head is None else head['kernel']


def _after_first(
  x: Float[Array, 'B _'], positions: Int[Array, 'B S'] | None
) -> Float[Array, 'B S']:
  """Shifts x, read at the state before each token, to that token; 0 where a sequence begins."""
  x = jnp.pad(x, ((0, 0), (1, 0)))  # a full row again: outputs are aligned with ids
  # The state before a sequence that is packed behind another belongs to that other sequence.
  return x if positions is None else jnp.where(positions == 0, 0, x)


def project(
  hidden: Float[Array, 'B S D'], kernel: Float[Array, 'D V'], rounded: bool = False
) -> Float[Array, 'B S V']:
  """Returns float32 logits of hidden states of any dtype, split over the vocabulary."""
  # One flat product, for the reason given in `layers.Linear`.
  logits = logit_product(hidden.reshape(-1, hidden.shape[-1]), kernel, rounded)
  return sharding.constrain(logits.reshape(*hidden.shape[:-1], -1), 'logits')
