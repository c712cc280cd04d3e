"""How much each token contributes to the score that a reward model reads at the last token.

Works on any reward model: neither needs training. What is made of the contributions is in
`rl.redistribution`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model.heads import scores
from segjax.model.llama import Block, Llama, LlamaConfig
from segjax.model.lora import backbone_variables

Params = dict[str, Any]


def gradient_attribution(
  params: Params, ids: Int[Array, 'B S'], last: Int[Array, 'B'], config: LlamaConfig
) -> Float[Array, 'B S']:
  """Change of the score at `last` as the token is put in place of a null token, to first order.

  a_t = (e_t - ē)ᵀ ∂score_last / ∂e_t,  e_t the token's embedding, ē the mean of all embeddings

  One forward and one backward pass. After the abstract of P2T (Wu et al., CVPR 2026, "Unlocking
  Token Rewards via Training-Free Reward Attribution"), whose null token it does not name; the mean
  stands for a token of which nothing is known.

  Args:
    params: the reward model.
    ids: tokens, padded on the right.
    last: position of each row's last token.
    config: the network.
  """
  table = params['backbone']['embedding'].astype(jnp.float32)
  embedded = table[ids]

  def total(change):
    def shifted(call, arguments, options, context):
      output = call(*arguments, **options)
      return output + change.astype(output.dtype) if context.method_name == 'embed' else output

    with nn.intercept_methods(shifted):
      score = scores(params, ids, config)
    return jnp.sum(jnp.take_along_axis(score, last[:, None], axis=1))

  slope = jax.grad(total)(jnp.zeros_like(embedded))
  return jnp.sum((embedded - jnp.mean(table, axis=0)[None, None]) * slope, axis=-1)


def attention_attribution(
  params: Params, ids: Int[Array, 'B S'], last: Int[Array, 'B'], config: LlamaConfig
) -> Float[Array, 'B S']:
  """Attention of the last layer from the token at `last` to each token, mean over the heads.

  Each row sums to 1. See Chan et al. 2024 (ABC), https://arxiv.org/abs/2402.00782.

  Args:
    params: the reward model.
    ids: tokens, padded on the right.
    last: position of each row's last token.
    config: the network.
  """
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  variables = backbone_variables(params)
  # Only the last layer's attention is needed, which no implementation of attention returns.
  depth = config.num_hidden_layers - 1
  below = dataclasses.replace(config, num_hidden_layers=depth)

  def layers(part):
    return {
      name: tree | {'layers': jax.tree.map(part, tree['layers'])}
      for name, tree in variables.items()
    }

  def before_last(network):
    x = network.embed(ids)
    return network.layers(x, positions, None)[0] if depth else x

  x = Llama(below).apply(layers(lambda w: w[:-1]), method=before_last)
  top = {name: tree['layers'] for name, tree in layers(lambda w: w[-1]).items()}
  query, key, _ = Block(config).apply(top, x, positions, method=Block._project)
  query = jnp.take_along_axis(query, last[:, None, None, None], axis=1)[:, 0]
  shared = query.shape[1] // key.shape[2]  # query heads of a key head
  key = jnp.repeat(key, shared, axis=2).astype(jnp.float32)
  logits = jnp.einsum('bhd,bshd->bhs', query.astype(jnp.float32), key) / config.head_dim**0.5
  logits = jnp.where(positions[:, None] <= last[:, None, None], logits, -jnp.inf)
  return jnp.mean(jax.nn.softmax(logits), axis=1)


ATTRIBUTIONS = {'gradient': gradient_attribution, 'attention': attention_attribution}
