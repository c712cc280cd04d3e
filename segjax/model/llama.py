"""Llama-3 and its kin in Flax Linen: RMSNorm, RoPE with scalings, grouped queries, SwiGLU.

What sets the other families apart are flags of `LlamaConfig`. The backbone only, tokens to hidden
states: `heads` turns those into log-probs or scores, `decode` samples. The layout of the weights in
HF files is in `hf.tensor_names`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from segjax.config.lora import check_fits
from segjax.config.settings import Lora, Network
from segjax.model import lora, sharding
from segjax.model.attention import attention
from segjax.model.embedding import embed
from segjax.model.layers import Linear, RMSNorm
from segjax.model.remat import checkpoint_policy
from segjax.model.rope import RopeScaling, rope_frequencies, rotate
from segjax.model.score_head import ScoreHead


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes of the network (HF's names) and how it is run.

  Attributes:
    family: of the checkpoint, one of `choices.FAMILIES`; nothing here depends on it but the names
      of tensors and classes in files.
    attention_bias: of query, key and value.
    output_bias: of the projection of the heads back to the width.
    qk_norm: whether each head's query and key are normalised before they are rotated.
    remat: activations saved for the backward pass: 'none' recomputes nothing and saves all, 'full'
      recomputes each layer from its input, and names of `choices.ACTIVATIONS`, joined by commas,
      save those.
    offload: such names, saved in the host's memory instead; needs a remat other than 'none'.
    attention: one of `choices.ATTENTION`.
    vocab_chunk: entries of the vocabulary whose logits exist at once, of all tokens of a device.
    round_logits: whether logits are rounded to `dtype`, as in transformers.
    scan_unroll: layers that an iteration of the scan holds.
    lora: of the network's adapters; None for a network without.
    score: of a reward model whose checkpoint has another head than a scalar; None for a scalar.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int = 8192
  rms_norm_eps: float = 1e-5
  rope_theta: float = 500_000.0
  rope_scaling: RopeScaling | None = None
  tie_word_embeddings: bool = False
  family: str = 'llama'
  attention_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  initializer_range: float = 0.02
  dtype: str = 'float32'
  remat: str = 'full'
  offload: str = ''
  attention: str = 'xla'
  vocab_chunk: int = 8192
  round_logits: bool = False
  scan_unroll: int = 1
  lora: Lora | None = None
  score: ScoreHead | None = None

  def __post_init__(self):
    check_fits(self.lora, self.family, self.tie_word_embeddings)


class RowLayout(NamedTuple):
  """How the tokens of each row form sequences; the default is one sequence per row.

  Attributes:
    positions: of each token in its sequence; None counts along the row.
    segment_ids: which tokens see each other, as in `attention`. A token of id 0 is seen by no other
      and sees none: its hidden state is a function of itself alone.
  """

  positions: Int[Array, 'B S'] | None = None
  segment_ids: Int[Array, 'B S'] | None = None


UNPACKED = RowLayout()


def make_config(network: Network) -> LlamaConfig:
  """Returns the config of a network of these sizes, to be trained from random weights."""
  sizes = dataclasses.asdict(network)
  head_dim = sizes.pop('head_dim') or network.hidden_size // network.num_attention_heads
  flags = {'attention_bias': network.family == 'qwen2', 'qk_norm': network.family == 'qwen3'}
  return LlamaConfig(head_dim=head_dim, **flags, **sizes)


def num_parameters(config: LlamaConfig) -> int:
  """Number of weights of the backbone with its language-model head."""
  width, heads = config.hidden_size, config.head_dim
  per_layer = 2 * width * heads * (config.num_attention_heads + config.num_key_value_heads)
  per_layer += 3 * width * config.intermediate_size + 2 * width  # MLP and two norms
  if config.attention_bias:
    per_layer += heads * (config.num_attention_heads + 2 * config.num_key_value_heads)
  if config.output_bias:
    per_layer += width
  if config.qk_norm:
    per_layer += 2 * heads
  if config.mlp_bias:
    per_layer += 2 * config.intermediate_size + width
  embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
  return embeddings + config.num_hidden_layers * per_layer + width


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

  `layout` is a prefix of the names in the table of activations in `sharding`.
  """

  config: LlamaConfig
  layout: str = ''

  def setup(self):
    c = self.config

    def linear(features, use_bias):
      return Linear(features, use_bias, c.initializer_range, c.lora)

    self.attention_norm = RMSNorm(c.rms_norm_eps)
    self.query = linear(c.num_attention_heads * c.head_dim, c.attention_bias)
    self.key = linear(c.num_key_value_heads * c.head_dim, c.attention_bias)
    self.value = linear(c.num_key_value_heads * c.head_dim, c.attention_bias)
    self.output = linear(c.hidden_size, c.output_bias)
    self.query_norm = RMSNorm(c.rms_norm_eps) if c.qk_norm else None
    self.key_norm = RMSNorm(c.rms_norm_eps) if c.qk_norm else None
    self.mlp_norm = RMSNorm(c.rms_norm_eps)
    self.gate = linear(c.intermediate_size, c.mlp_bias)
    self.up = linear(c.intermediate_size, c.mlp_bias)
    self.down = linear(c.hidden_size, c.mlp_bias)

  def _laid_out(self, x: Array, *names: str) -> Array:
    """Constrains x to one layout after the other: that of the last product, that of the next.

    Without the first, the partitioner may choose to gather the product's weight instead.
    """
    for name in names:
      x = sharding.constrain(x, f'{self.layout}{name}')
    return x

  def _heads(
    self, x: Float[Array, 'B S _'], norm: RMSNorm | None = None
  ) -> Float[Array, 'B S _ h']:
    heads = self._laid_out(x, 'product')
    heads = heads.reshape(*x.shape[:2], -1, self.config.head_dim)
    heads = self._laid_out(heads, 'heads')
    return heads if norm is None else norm(heads)

  def _project(self, x, positions):
    c = self.config
    frequency = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    rope = positions, frequency, c.rope_scaling.attention_factor if c.rope_scaling else 1.0
    # The norm still works on a part of the positions; the products need all of them.
    y = self._laid_out(self.attention_norm(x), 'gathered')
    query = rotate(self._heads(self.query(y), self.query_norm), *rope)
    # Rotated before it is cached: a position never changes, so no step rotates old keys.
    key = rotate(self._heads(self.key(y), self.key_norm), *rope)
    value = self._heads(self.value(y))
    return (
      # `remat` and `offload` choose by these names; without a policy they do nothing.
      checkpoint_name(query, 'query'),
      checkpoint_name(key, 'key'),
      checkpoint_name(value, 'value'),
    )

  def _finish(self, x, attended):
    attended = self._laid_out(attended.reshape(*x.shape[:2], -1), 'product')
    # The sum over tensor is needed only for a device's own positions.
    x = checkpoint_name(self._laid_out(x + self.output(attended), 'hidden'), 'residual')
    y = self._laid_out(self.mlp_norm(x), 'gathered')
    gate, up = checkpoint_name(self.gate(y), 'gate'), checkpoint_name(self.up(y), 'up')
    y = self._laid_out(nn.silu(gate) * up, 'product')
    return self._laid_out(x + self.down(y), 'hidden')

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    positions: Int[Array, 'B S'],
    segment_ids: Int[Array, 'B S'] | None = None,
  ) -> tuple[Float[Array, 'B S D'], None]:
    """Runs the layer over rows padded on the right; the None is what a scan collects."""
    x = checkpoint_name(x, 'hidden')
    query, key, value = self._project(x, positions)
    attended = attention(query, key, value, self.config.attention, segment_ids=segment_ids)
    return self._finish(x, attended), None

  def with_cache(
    self,
    x: Float[Array, 'B S D'],
    positions: Int[Array, 'B S'],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
  ) -> tuple[Float[Array, 'B S D'], Any]:
    """Runs the layer with attention to a cache.

    Args:
      x: hidden states.
      positions: of the tokens.
      attend: (query, key, value) -> (attended, the cache with the new keys and values).

    Returns:
      Hidden states and the cache.
    """
    query, key, value = self._project(x, positions)
    attended, cache = attend(query, key, value)
    return self._finish(x, attended), cache


class Llama(nn.Module):
  """The backbone: tokens to hidden states after the final norm, layers scanned."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.embedding = self.param(
      'embedding', nn.initializers.normal(c.initializer_range), (c.vocab_size, c.hidden_size)
    )
    block = Block
    if c.remat != 'none':
      # The barriers of prevent_cse are not needed: a scan keeps forward and backward pass apart.
      block = nn.remat(Block, prevent_cse=False, policy=checkpoint_policy(c.remat, c.offload))
    # One traced layer: compile time does not grow with depth, and weights are stacked [L, ...].
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0, lora.ADAPTER: 0},
      split_rngs={'params': True},  # else all layers would start with equal weights
      in_axes=nn.broadcast,  # positions and segment_ids are shared by the layers
      length=c.num_hidden_layers,
      unroll=c.scan_unroll,
    )(c)
    self.norm = RMSNorm(c.rms_norm_eps)

  def embed(self, ids: Int[Array, 'B S']) -> Float[Array, 'B S D']:
    """Token embeddings in the compute dtype."""
    return sharding.constrain(embed(self.embedding, ids, self.config.dtype), 'hidden')

  def finish(self, x: Float[Array, 'B S D']) -> Float[Array, 'B S D']:
    """The norm after the last layer."""
    return sharding.constrain(self.norm(x), 'hidden')

  def __call__(self, ids: Int[Array, 'B S'], rows: RowLayout = UNPACKED) -> Float[Array, 'B S D']:
    """Hidden state after each token; rows are padded on the right, so no mask is needed."""
    ids = sharding.constrain(ids, 'tokens')
    positions, segment_ids = rows
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    if segment_ids is not None:
      segment_ids = sharding.constrain(segment_ids, 'tokens')
    x, _ = self.layers(self.embed(ids), positions, segment_ids)
    return self.finish(x)
