"""Advantages without a critic, from the rewards of N responses to one prompt.

The functions share a signature (reward, action_start, mask), [N, T] each, and are named in
ESTIMATORS. Whitening over the batch (`masked.whiten`) comes after all of them.

Rewards are those of each token, with everything that was spread, added and charged. With
kl_coef in them the KL penalty is part of what is compared, as in RLOO and REINFORCE++; GRPO has it
in the loss.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.advantages import gae, macro_gae, with_first
from segjax.rl.masked import masked_mean, whiten
from segjax.rl.recurrences import latest


def return_to_go(
  reward: Float[Array, 'T'], mask: Bool[Array, 'T'], *, gamma: ScalarLike = 1.0
) -> Float[Array, 'T']:
  """Discounted sum of the rewards of one response from each token on, in at least float32.

  G_t = r_t + γ G_{t+1}, which is `gae` of λ = 1 and values of 0.

  Args:
    reward: reward of each token.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ from token to token.

  Returns:
    G_t; 0 outside the mask, where rewards may be anything.
  """
  return gae(reward, jnp.zeros_like(reward), mask, gamma=gamma, gae_lambda=1.0)


def reinforce_plus_plus(
  reward: Float[Array, 'N T'],
  action_start: Bool[Array, 'N T'],
  mask: Bool[Array, 'N T'],
  *,
  gamma: ScalarLike = 1.0,
) -> Float[Array, 'N T']:
  """Return-to-go of each token; `whiten` over the batch is what makes it an advantage.

  See Hu et al. 2025 (REINFORCE++), https://arxiv.org/abs/2501.03262, where the reward of a response
  comes at its end and each token pays for its KL. N may be 1.
  """
  del action_start
  return jax.vmap(functools.partial(return_to_go, gamma=gamma))(reward, mask)


def leave_one_out(
  reward: Float[Array, 'N T'],
  action_start: Bool[Array, 'N T'],
  mask: Bool[Array, 'N T'],
  *,
  gamma: ScalarLike = 1.0,
) -> Float[Array, 'N T']:
  """Return-to-go of each token, less the mean of the other responses' at the same index.

  A_it = G_it − 1 / (N − 1) Σ_{j≠i} G_j,min(t, last_j)

  A response that is over counts with the return of its last token. The baseline depends on t and on
  the other responses alone, so it leaves the gradient unbiased. If only last tokens have rewards,
  γ = 1, this is RLOO: R_i − mean_{j≠i} R_j at every token. See Ahmadian et al. 2024,
  https://arxiv.org/abs/2402.14740.

  PRIME (Cui et al. 2025, https://arxiv.org/abs/2502.01456) subtracts from each token's reward the
  others' mean reward per token before the sum; that baseline grows with the tokens that are left,
  and so charges or pays for length.

  Args:
    reward: rewards of N responses to one prompt, N at least 2.
    action_start: not read.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ from token to token.

  Returns:
    A; 0 outside the mask, where rewards may be anything.
  """
  to_go = reinforce_plus_plus(reward, action_start, mask, gamma=gamma)
  held = jax.vmap(lambda x, mask: latest(x, mask, jnp.zeros((), x.dtype)))(to_go, mask)
  others = (jnp.sum(held, axis=0, keepdims=True) - held) / (len(held) - 1)
  return jnp.where(mask, to_go - others, 0)


def group_norm(
  reward: Float[Array, 'N T'],
  action_start: Bool[Array, 'N T'],
  mask: Bool[Array, 'N T'],
  *,
  gamma: ScalarLike = 1.0,
) -> Float[Array, 'N T']:
  """Sum of the normalised rewards of the segments that end at or after each token.

  r̃_j = (R_j − mean R) / std R over all segments of the group
  A_it = Σ_{j: end of j ≥ t} γ^k r̃_j, k segments after that of token t

  R_j is the sum of the rewards of segment j; the population's std has the floor of `whiten`. GRPO
  with process supervision, γ = 1: Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300,
  section 4.1.3, which whitens no more and has its KL penalty in the loss. With one segment per
  response it is GRPO with outcome supervision.

  Args:
    reward: rewards of N responses to one prompt, N at least 2.
    action_start: True on the first token of each segment. What follows a segment, such as a stop
      token, counts with it. The first token under the mask always starts one.
    mask: True on the tokens that the policy chose, in any pattern.
    gamma: discount γ from segment to segment.

  Returns:
    A; 0 outside the mask, where rewards may be anything.
  """
  return _normalized_to_go(reward, action_start, mask, gamma, whiten)


def dr_grpo(
  reward: Float[Array, 'N T'],
  action_start: Bool[Array, 'N T'],
  mask: Bool[Array, 'N T'],
  *,
  gamma: ScalarLike = 1.0,
) -> Float[Array, 'N T']:
  """`group_norm` without the division by std R.

  The division weighs prompts by how little their responses differ. See Liu et al. 2025 (Dr. GRPO),
  https://arxiv.org/abs/2503.20783, there for the reward of a whole response.
  """
  return _normalized_to_go(reward, action_start, mask, gamma, _centre)


ESTIMATORS = {
  'rloo': leave_one_out,
  'group_norm': group_norm,
  'dr_grpo': dr_grpo,
  'reinforce_plus_plus': reinforce_plus_plus,
}


def _normalized_to_go(reward, action_start, mask, gamma, normalize):
  """Sum of the actions' normalised rewards from the action of each token on."""
  start = jax.vmap(with_first)(action_start, mask)

  def sums(reward, gamma):
    one = functools.partial(macro_gae, gamma=gamma, gae_lambda=1.0)
    return jax.vmap(one)(reward, jnp.zeros_like(reward), start, mask)

  of_action = normalize(sums(reward, 0.0), start)  # with γ = 0, the sum over one action
  return sums(of_action, gamma)


def _centre(x: Float[Array, 'N T'], mask: Bool[Array, 'N T']) -> Float[Array, 'N T']:
  """x less its mean under the mask; 0 outside."""
  return jnp.where(mask, x - masked_mean(x, mask), 0)
