"""Log-probability of a token, entropy of its distribution, and ratios of log-probabilities.

Not here: the network's head, which has log-probs and entropies equal to these without [B, T, V]
logits that exist together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.rl.masked import at_least_float32

# Bound of log-ratios before an exponential: e^20 is far beyond every clip, and sums of it and their
# squares are finite in float32, where e^89 is not.
MAX_LOG_RATIO = 20.0


def log_ratio(logprob: Float[Array, '*N'], other: Float[Array, '*N']) -> Float[Array, '*N']:
  """ln π − ln π', held within ±MAX_LOG_RATIO so that its exponential is finite.

  NaN stays NaN. Beyond the bound the gradient is 0.
  """
  difference = at_least_float32(logprob) - at_least_float32(other)
  return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def logprob_and_entropy(
  logits: Float[Array, '*N V'], target: Int[Array, '*N']
) -> tuple[Float[Array, '*N'], Float[Array, '*N']]:
  """Log-probability of the target and entropy, both in nats and at least float32.

  logprob = l_y − ln Σ_v exp l_v
  entropy = −Σ_v p_v ln p_v,  p = softmax(l)

  The target is picked by comparing it with an iota rather than by a gather, so that with V sharded
  every device looks at its own slice and one sum over V joins them. A logit of −inf has p = 0 and
  adds nothing to the entropy.

  Args:
    logits: over the full vocabulary, at temperature 1, unfiltered.
    target: token ids in [0, V).

  Returns:
    (logprob, entropy).
  """
  logits = at_least_float32(logits)
  shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  log_normalizer = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
  vocabulary = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
  is_target = vocabulary == target[..., None]
  picked = jnp.sum(jnp.where(is_target, shifted, 0), axis=-1)
  probability = jnp.exp(shifted - log_normalizer[..., None])
  # 0 · (−inf) is NaN, in the value and in the gradient: replace the factor, not the product.
  finite = jnp.where(jnp.isneginf(shifted), 0, shifted)
  entropy = log_normalizer - jnp.sum(probability * finite, axis=-1)
  return picked - log_normalizer, entropy
