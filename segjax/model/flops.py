"""FLOPs of the network, counted from its sizes; a multiplication with an addition is 2 FLOPs.

XLA's own count has the body of a scan once, so it is wrong for scanned layers. Only matrix products
count (no norms, rotations, softmax), as in the definition of model FLOP utilisation (Chowdhery et
al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
"""

from segjax.model.llama import LlamaConfig


def forward_flops(
  config: LlamaConfig, tokens: float | int, attended_pairs: float | int, head: str = 'language'
) -> float:
  """FLOPs of one forward pass. A backward pass takes twice as many; remat adds a forward pass.

  2 · tokens · (weights in matrix products) + 4 · pairs · L · H · h, the latter for q kᵀ and the
  weighted values.

  Args:
    attended_pairs: pairs of tokens of which one sees the other, Σ n (n + 1) / 2 over sequences.
    head: 'language', 'scalar', or 'none' for the backbone alone.
  """
  width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  layer = 2 * width * (heads + keys) + 3 * width * config.intermediate_size
  weights = config.num_hidden_layers * layer
  weights += {'language': width * config.vocab_size, 'scalar': width, 'none': 0}[head]
  return 2 * tokens * weights + 4 * attended_pairs * config.num_hidden_layers * heads


def attended_pairs(length: float | int, first: float | int = 0) -> float:
  """Number of pairs (a, b) of positions with b ≤ a and a ≥ first."""
  return length * (length + 1) / 2 - first * (first + 1) / 2
