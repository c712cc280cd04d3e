"""Which tokens of a rollout the policy is trained on, by the names in LEARN_ON.

'high_ref_entropy' are those at which the REFERENCE was least sure, by `high_entropy_tokens`: its
entropies are at hand, while those of the sampling policy would take another forward pass.
'segment_starts' are the first tokens of the segments, of which the stop token is none.

Not here: the loss (`losses`), which averages over them alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

LEARN_ON = ('all', 'high_ref_entropy', 'segment_starts')


def high_entropy_tokens(
  entropy: Float[Array, 'B T'], mask: Bool[Array, 'B T'], share: ScalarLike
) -> Bool[Array, 'B T']:
  """Marks the tokens of the largest entropies: H_t ≥ τ, where τ is the k-th largest of all.

  k = ⌈share · n⌉ of the n masked tokens of the batch, at least 1. Tokens of entropy τ are all
  marked, so that there may be more than k; the order of the rows does not matter.

  See Wang et al. 2025, https://arxiv.org/abs/2506.01939, who train on the top 20 % of each
  minibatch by the entropy of the policy, and average over these tokens.

  Args:
    entropy: of the distribution each token was drawn from, in nats; under False in the mask it may
      be anything, NaN included.
    mask: True on the tokens to choose from.
    share: in (0, 1].
  """
  ranked = jnp.sort(jnp.where(mask, entropy, -jnp.inf), axis=None, descending=True)
  # Less what rounding may have added to a product that is an integer.
  count = jnp.ceil(share * jnp.sum(mask) - 1e-3).astype(jnp.int32)
  return mask & (entropy >= ranked[jnp.maximum(count - 1, 0)])
