"""Per-token estimates of KL(policy ‖ reference) and the controller of its coefficient.

Not here: how the penalty joins the reward (`rewards.shaped_reward`).

The estimators read the log-probs of a token that the policy sampled; see J. Schulman,
"Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from segjax.rl.logprobs import log_ratio
from segjax.rl.masked import at_least_float32


def k1(logprob: Float[Array, '*N'], ref_logprob: Float[Array, '*N']) -> Float[Array, '*N']:
  """ln π − ln π_ref: unbiased, high variance, may be negative. In nats, at least float32."""
  return at_least_float32(logprob) - at_least_float32(ref_logprob)


def k2(logprob: Float[Array, '*N'], ref_logprob: Float[Array, '*N']) -> Float[Array, '*N']:
  """½ (ln π − ln π_ref)²: biased, low variance, never negative. In nats², at least float32."""
  return jnp.square(k1(logprob, ref_logprob)) / 2


def k3(logprob: Float[Array, '*N'], ref_logprob: Float[Array, '*N']) -> Float[Array, '*N']:
  """π_ref/π − 1 − ln(π_ref/π): unbiased, low variance, never negative. At least float32.

  The log-ratio is held within ±20 (`logprobs.log_ratio`).
  """
  x = log_ratio(ref_logprob, logprob)
  return jnp.expm1(x) - x


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3}


def adaptive_kl_coef(
  coef: ScalarLike,
  kl: ScalarLike,
  target: ScalarLike,
  num_sequences: ScalarLike,
  horizon: ScalarLike = 10_000,
) -> Float[Array, '']:
  """Moves the KL coefficient towards the value that holds the KL at its target.

  β ← β (1 + clip(kl/target − 1, −0.2, 0.2) · n / horizon)

  See Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

  Args:
    coef: β so far.
    kl: measured over the rollout, in the unit of the target.
    target: the KL to hold, > 0.
    num_sequences: n, how many sequences the rollout has.
    horizon: in sequences; the larger, the slower.
  """
  error = jnp.clip(jnp.asarray(kl, float) / target - 1, -0.2, 0.2)
  return coef * (1 + error * num_sequences / horizon)
