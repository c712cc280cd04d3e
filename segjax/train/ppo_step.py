"""The PPO update: clipped policy and value losses on one minibatch of a rollout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, ScalarLike

from segjax.model.heads import token_logprobs, values
from segjax.rl import kl
from segjax.rl.losses import batch_mean, num_terms, policy_loss, value_loss
from segjax.train import accumulate
from segjax.train.experience import Recipe, join, join_attended, response_window, take_rows
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState
from segjax.types import Experience

Found = tuple[Array, dict[str, Array]]  # a loss and its metrics


def policy_objective(
  params: Any,
  batch: Experience,
  count: Float[Array, ''],
  kl_coef: ScalarLike,
  *,
  recipe: Recipe,
) -> Found:
  """The clipped surrogate, less the entropy bonus, plus the KL penalty where it is in the loss.

  Args:
    count: `num_terms` of the whole minibatch of which `batch` may be a part.
    kl_coef: the coefficient of the KL, for ppo.kl_in=loss.
  """
  ppo, rollout = recipe.ppo, batch.rollout
  mask = rollout.response_mask
  logprob, entropy = (
    response_window(x, rollout.prompt_length, rollout.response_ids.shape[1])
    for x in token_logprobs(params, join(rollout), recipe.policy, attended=join_attended(rollout))
  )
  mean = functools.partial(batch_mean, mask=mask, mean=ppo.loss_mean, count=count)
  loss, metrics = policy_loss(
    logprob,
    rollout.old_logprob,
    batch.advantage,
    mask,
    clip_eps=ppo.clip_eps,
    clip_eps_high=ppo.clip_eps_high or None,
    dual_clip=ppo.dual_clip or None,
    mean=ppo.loss_mean,
    count=count,
  )
  metrics['entropy'] = mean(entropy)
  if ppo.entropy_coef:
    loss = loss - ppo.entropy_coef * metrics['entropy']
  if ppo.kl_in == 'loss':
    # Masked first: garbage under the mask could overflow.
    difference = jnp.where(mask, logprob, 0), jnp.where(mask, batch.ref_logprob, 0)
    metrics['kl'] = mean(kl.ESTIMATORS[ppo.kl_estimator](*difference))
    loss = loss + kl_coef * metrics['kl']
  return loss, {'loss': loss} | metrics


def value_objective(
  params: Any, batch: Experience, count: Float[Array, ''], *, recipe: Recipe
) -> Found:
  """The clipped value loss of `rl.losses.value_loss` for these parameters."""
  rollout = batch.rollout
  value = response_window(
    values(params, join(rollout), recipe.critic, attended=join_attended(rollout)),
    rollout.prompt_length,
    rollout.response_ids.shape[1],
  )
  loss, metrics = value_loss(
    value,
    batch.value,
    batch.return_,
    batch.value_mask,
    value_clip_eps=recipe.ppo.value_clip_eps or None,
    mean=recipe.ppo.loss_mean,
    count=count,
  )
  return loss, {'loss': loss} | metrics


@functools.partial(
  jax.jit,
  static_argnames=('recipe', 'total_steps', 'policy_from'),
  donate_argnames=('policy', 'critic'),
)
def ppo_step(
  policy: TrainState,
  critic: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  kl_coef: ScalarLike,
  *,
  recipe: Recipe,
  total_steps: int,
  policy_from: int | None = 0,
) -> tuple[TrainState, TrainState, dict[str, Array]]:
  """One update of critic and policy on the minibatch `rows` of the experience.

  Metrics carry the prefixes policy/ and value/; `bad` counts updates that were not finite and
  were left out.

  Args:
    kl_coef: the coefficient of the KL, read where ppo.kl_in=loss.
    total_steps: updates of the critic in the whole run.
    policy_from: updates of the critic before the policy's first; None leaves the policy as it is.
  """
  ppo = recipe.ppo
  batch = take_rows(experience, rows)
  pieces = len(rows) // ppo.micro_batch if ppo.micro_batch else 1
  metrics = {'bad': jnp.int32(0)}

  def update(name, state, objective, optimizer, steps, *rest):
    (loss, found), grads = accumulate.value_and_grad(
      functools.partial(objective, recipe=recipe), state.params, batch, pieces, *rest
    )
    state, done = apply_update(state, grads, loss, optimizer, steps)
    metrics['bad'] += done.pop('bad')
    metrics.update({f'{name}/{key}': value for key, value in (found | done).items()})
    return state

  if policy_from is not None:
    count = num_terms(batch.rollout.response_mask, ppo.loss_mean)
    steps = total_steps - policy_from
    policy = update('policy', policy, policy_objective, ppo.policy_optimizer, steps, count, kl_coef)
  count = num_terms(batch.value_mask, ppo.loss_mean)
  critic = update('value', critic, value_objective, ppo.critic_optimizer, total_steps, count)
  return policy, critic, metrics
