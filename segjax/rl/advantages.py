"""Advantages and returns of one sequence by the values of a critic, over tokens or macro-actions.

Not here: estimators without a critic (`critic_free`), and whitening (`masked.whiten`), which looks
at the whole batch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.rl.masked import at_least_float32
from segjax.rl.recurrences import latest, linear_backwards
from segjax.types import Segments


def gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  mask: Bool[Array, 'T'],
  *,
  gamma: ScalarLike = 1.0,
  gae_lambda: ScalarLike = 0.95,
) -> Float[Array, 'T']:
  """Generalised advantage estimate of each token that the policy chose, in at least float32.

  δ_t = r_t + γ V_{t+1} − V_t
  A_t = δ_t + γ λ A_{t+1}

  t + 1 is the next token under the mask: tokens that the policy did not choose, such as what a tool
  answered, are passed over, without discount. The last token is followed by value 0, whether or not
  it is a stop token. See Schulman et al. 2016, https://arxiv.org/abs/1506.02438.

  Args:
    reward: r_t, for the action of sampling token t.
    value: V_t, read at the state that token t was sampled from.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ.
    gae_lambda: λ.

  Returns:
    A_t; 0 outside the mask, where rewards and values may be anything.
  """
  return jnp.where(mask, _advantage(reward, value, mask, mask, gamma, gae_lambda), 0)


def macro_gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  action_start: Bool[Array, 'T'],
  mask: Bool[Array, 'T'],
  *,
  gamma: ScalarLike = 1.0,
  gae_lambda: ScalarLike = 0.95,
) -> Float[Array, 'T']:
  """Generalised advantage estimate of each macro-action, given to all of its tokens.

  δ_j = R_j + γ V_{j+1} − V_j
  A_j = δ_j + γ λ A_{j+1}

  Action j is the run of tokens from one start to before the next. R_j is the sum of their rewards,
  undiscounted, and V_j the value at the first of them: γ and λ count actions. With every token a
  start this is `gae`. See Chai et al. 2024 (MA-RLHF), https://arxiv.org/abs/2410.02743.

  Args:
    reward: reward of each token.
    value: value of each token, read at the state that it was sampled from; only those at starts
      matter.
    action_start: True on the first token of each action, see `action_starts`. A start outside the
      mask does not count, and the first token under the mask always is one.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ from action to action.
    gae_lambda: λ.

  Returns:
    A_j at every token of action j, in at least float32; 0 outside the mask, where rewards and
    values may be anything.
  """
  start = with_first(action_start, mask)
  advantage = _advantage(reward, value, start, mask, gamma, gae_lambda)
  advantage = latest(advantage, start, jnp.zeros((), advantage.dtype))
  return jnp.where(mask, advantage, 0)


def border_gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  action_start: Bool[Array, 'T'],
  mask: Bool[Array, 'T'],
  *,
  gamma: ScalarLike = 1.0,
  gae_lambda: ScalarLike = 0.95,
) -> Float[Array, 'T']:
  """Advantage of each token, with a λ that decays only from one macro-action to the next.

  δ_t = r_t + γ V_{t+1} − V_t
  A_t = δ_t + γ λ_t A_{t+1},  λ_t = λ if token t + 1 starts an action, else 1

  Within an action the TD errors add up, so that A_t bootstraps from the values at the starts of
  later actions alone, while its baseline stays that of the token. With every token a start this is
  `gae`. After the abstract of Gong et al. 2026 (SAE), https://arxiv.org/abs/2601.07320, which cuts
  at improbable tokens.

  Args:
    reward: reward of each token.
    value: V_t, read at the state that token t was sampled from.
    action_start: True on the first token of each action, see `action_starts`.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ from token to token.
    gae_lambda: λ.

  Returns:
    A_t; 0 outside the mask, where rewards and values may be anything.
  """
  decay = jnp.where(action_start, gae_lambda, 1)
  return jnp.where(mask, _advantage(reward, value, mask, mask, gamma, decay), 0)


def token_gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  action_start: Bool[Array, 'T'],
  mask: Bool[Array, 'T'],
  *,
  gamma: ScalarLike = 1.0,
  gae_lambda: ScalarLike = 0.95,
) -> Float[Array, 'T']:
  """`gae`, with the signature of the others."""
  del action_start
  return gae(reward, value, mask, gamma=gamma, gae_lambda=gae_lambda)


GAE_LEVELS = {'token': token_gae, 'segment': macro_gae, 'border': border_gae}


def length_adaptive_lambda(num_actions: Int[Array, ''], factor: ScalarLike) -> Float[Array, '']:
  """λ = 1 − 1 / (α l), at least 0: the longer the response, the farther its advantages look.

  A TD error weighs λ^k in the advantage k actions before, and Σ_k λ^k = 1 / (1 − λ) = α l. See Yue
  et al. 2025 (VAPO), https://arxiv.org/abs/2504.05118, with l in tokens and α = 0.05.

  Args:
    num_actions: l, the actions from each of which to the next λ decays.
    factor: α, above 0.
  """
  return jnp.maximum(1 - 1 / (factor * jnp.maximum(num_actions, 1)), 0)


def action_starts(segments: Segments, response_mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """First tokens of the macro-actions: the segments, and each token outside all of them.

  So a stop token that lies in no segment is an action of its own. A critic that serves `macro_gae`
  is read at these tokens alone, so it is to be trained at these alone.
  """
  return segments.start | (response_mask & (segments.segment_id < 0))


def with_first(action_start: Bool[Array, 'T'], mask: Bool[Array, 'T']) -> Bool[Array, 'T']:
  """The starts under the mask, of which its first token always is one."""
  first = jnp.arange(mask.shape[0]) == jnp.argmax(mask)
  return mask & (action_start | first)


def returns(
  advantage: Float[Array, '*N'], value: Float[Array, '*N'], mask: Bool[Array, '*N']
) -> Float[Array, '*N']:
  """A_t + V_t, what the critic learns to predict; 0 outside the mask."""
  return jnp.where(mask, at_least_float32(advantage) + at_least_float32(value), 0)


def _advantage(reward, value, start, mask, gamma, gae_lambda):
  """A_j at the first token of each action j; something meaningless at the others.

  With c_t = what A at the tokens before t adds to their own rewards,
  A_j = c_{t+1} + r_t − V_j at the first token t of action j,
  c_t = γ (V_j + λ A_j) = γ λ c_{t+1} + γ (λ r_t + (1 − λ) V_j) there, and c_{t+1} + r_t elsewhere.
  """
  reward = jnp.where(mask, at_least_float32(reward), 0)
  value = jnp.where(mask, at_least_float32(value), 0)
  dtype = jnp.promote_types(reward.dtype, value.dtype)
  factor = jnp.where(start, gamma * gae_lambda, 1).astype(dtype)
  term = jnp.where(start, gamma * (gae_lambda * reward + (1 - gae_lambda) * value), reward)
  following = linear_backwards(factor, term.astype(dtype))
  return jnp.pad(following[1:], (0, 1)) + reward - value
