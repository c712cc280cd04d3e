"""Advantages and returns of one sequence of rewards.

Not here: whitening (`masked.whiten`), which looks at the whole batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.masked import at_least_float32


def gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  mask: Bool[Array, 'T'],
  *,
  gamma: ScalarLike = 1.0,
  gae_lambda: ScalarLike = 0.95,
) -> Float[Array, 'T']:
  """Generalised advantage estimate, in at least float32.

  δ_t = r_t + γ V_{t+1} − V_t
  A_t = δ_t + γ λ A_{t+1}

  Rewards and values outside the mask count as 0, so the last token of the response is followed by
  value 0, whether or not it is a stop token. See Schulman et al. 2016,
  https://arxiv.org/abs/1506.02438.

  Args:
    reward: r_t, for the action of sampling token t.
    value: V_t, read at the state that token t was sampled from.
    mask: True on the response, one contiguous run that may begin anywhere.
    gamma: discount γ.
    gae_lambda: λ.

  Returns:
    A_t; 0 outside the mask.
  """
  reward = jnp.where(mask, at_least_float32(reward), 0)
  value = jnp.where(mask, at_least_float32(value), 0)
  next_value = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])
  delta = reward + gamma * next_value - value

  def step(advantage, delta_t):
    advantage = delta_t + gamma * gae_lambda * advantage
    return advantage, advantage

  _, advantage = jax.lax.scan(step, jnp.zeros((), delta.dtype), delta, reverse=True)
  return jnp.where(mask, advantage, 0)


def returns(
  advantage: Float[Array, '*N'], value: Float[Array, '*N'], mask: Bool[Array, '*N']
) -> Float[Array, '*N']:
  """A_t + V_t, what the critic learns to predict; 0 outside the mask."""
  return jnp.where(mask, at_least_float32(advantage) + at_least_float32(value), 0)
