"""Rewards from the log-probs of language models: of a whole response, and of each of its tokens.

Not here: how they join the rewards of a reward model (`train.reward_shaping`).

To add a kind: write it with the common signature (logprob, ref_logprob, old_logprob) and name it in
KINDS. All three are in nats and of the same tokens: by the language model that rewards, by the
reference, and by the policy that drew them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.kl import k1
from segjax.rl.masked import masked_sum
from segjax.types import Segments

LEVELS = ('token', 'segment')


def implicit_reward(
  logprob: Float[Array, 'B S'],
  ref_logprob: Float[Array, 'B S'],
  response_mask: Bool[Array, 'B S'],
  beta: ScalarLike,
) -> Float[Array, 'B']:
  """β Σ_t (ln π − ln π_ref) over a response: the reward for which π is optimal at KL penalty β.

  It is known but for a constant of the prompt, which is the same for both responses of a pair:
  `losses.bradley_terry` of two such rewards is the loss of Direct Preference Optimization (Rafailov
  et al. 2023, https://arxiv.org/abs/2305.18290, equations 5 and 7).

  Args:
    logprob: ln π of each token.
    ref_logprob: ln π_ref.
    response_mask: True on the response, stop token included.
    beta: β, reward per nat.

  Returns:
    The reward of each response, in at least float32.
  """
  return beta * masked_sum(k1(logprob, ref_logprob), response_mask, axis=1)


def implicit(
  logprob: Float[Array, '*N'], ref_logprob: Float[Array, '*N'], old_logprob: Float[Array, '*N']
) -> Float[Array, '*N']:
  """ln π_lm − ln π_ref: what a token adds to the `implicit_reward` of a model trained by DPO.

  See Zhong et al. 2024 (reinforced token optimization, RTO), https://arxiv.org/abs/2404.18922,
  which adds it to the reward of a reward model at the last token, and to the KL penalty. Alone, at
  c per nat and a KL penalty of β per nat, its optimum is π ∝ π_ref (π_lm / π_ref)^(c / β): π_lm
  itself at c = β, and beyond it where c is larger.
  """
  del old_logprob
  return k1(logprob, ref_logprob)


def teacher(
  logprob: Float[Array, '*N'], ref_logprob: Float[Array, '*N'], old_logprob: Float[Array, '*N']
) -> Float[Array, '*N']:
  """ln π_teacher − ln π_old: minus the estimate k1 of KL(π_old ‖ π_teacher) at a token.

  With a discount of 0 each token answers for itself alone, and a policy gradient on it lowers that
  KL on texts of the policy: on-policy distillation. See K. Lu and Thinking Machines Lab, "On-Policy
  Distillation", https://thinkingmachines.ai/blog/on-policy-distillation/ (2025); Agarwal et al.
  2023, https://arxiv.org/abs/2306.13649.
  """
  del ref_logprob
  return k1(logprob, old_logprob)


KINDS = {'implicit': implicit, 'teacher': teacher}


def token_reward(
  logprob: Float[Array, '*N'],
  ref_logprob: Float[Array, '*N'],
  old_logprob: Float[Array, '*N'],
  response_mask: Bool[Array, '*N'],
  *,
  kind: str,
  coef: ScalarLike,
  clip: ScalarLike | None = None,
) -> Float[Array, '*N']:
  """reward_t = clip(coef · kind_t, −clip, clip), as the released code of RTO has it.

  That code (https://github.com/zkshan2002/RTO) runs the implicit kind at coef = clip = 0.05, which
  bounds the log-ratio of a token by 1 nat.

  Args:
    logprob: ln of the probability under the language model that rewards.
    ref_logprob: the same under the reference.
    old_logprob: the same under the policy that drew the tokens.
    response_mask: True on the response, stop token included.
    kind: one of KINDS.
    coef: reward per nat.
    clip: largest size of a token's reward, in the unit of the rewards; None means no bound.

  Returns:
    The reward of each token, in at least float32; 0 outside the response.

  Raises:
    ValueError: on an unknown kind.
  """
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r} is unknown; use one of {tuple(KINDS)}.')
  reward = coef * KINDS[kind](logprob, ref_logprob, old_logprob)
  if clip is not None:
    reward = jnp.clip(reward, -clip, clip)
  return jnp.where(response_mask, reward, 0)


def pool(reward: Float[Array, 'T'], segments: Segments) -> Float[Array, 'T']:
  """The sum of the rewards over each segment, read at its last token; 0 at all others.

  `spreads.dense_reward` spreads such sums again.

  Args:
    reward: reward of each token.
    segments: the segments of the response.
  """
  size = reward.shape[0]
  segment = jnp.where(segments.segment_id >= 0, segments.segment_id, size)
  total = jax.ops.segment_sum(reward, segment, size + 1)
  return jnp.where(segments.end, total[segment], 0)
