"""Redistributes the one score of a response over its tokens by what they contribute to it.

Not here: the differences of RED (`rewards.red`), which read the score at every token, and how
contributions are read from a network (`model.attribution`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.masked import at_least_float32
from segjax.rl.spreads import last_token


def by_attention(
  attention: Float[Array, 'T'],
  score: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  *,
  share: ScalarLike = 1.0,
) -> Float[Array, 'T']:
  """Gives each token the score's part that the reward model's attention says it earned.

  r_t = β R a_t / Σ_response a + (1 − β) R 1[t is the last token]

  The rewards of a response sum to its score R. See Chan et al. 2024 (ABC),
  https://arxiv.org/abs/2402.00782.

  Args:
    attention: a_t, from the last token to each.
    score: of the text up to each token; R is that of the last.
    response_mask: True on the response, stop token included.
    share: β.

  Returns:
    The reward of each token; 0 outside the response.
  """
  attention = jnp.where(response_mask, at_least_float32(attention), 0)
  weight = attention / jnp.maximum(jnp.sum(attention), jnp.finfo(attention.dtype).tiny)
  last = last_token(response_mask)
  total = jnp.sum(jnp.where(last, score, 0))
  return jnp.where(response_mask, total * (share * weight + (1 - share) * last), 0)
