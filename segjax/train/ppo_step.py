"""The PPO update: clipped policy and value losses on one minibatch of a rollout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, ScalarLike

from segjax.model.heads import token_logprobs, values
from segjax.model.llama import LlamaConfig
from segjax.rl import kl
from segjax.rl.losses import batch_mean, num_terms, policy_loss, value_loss
from segjax.train import accumulate
from segjax.train.experience import Recipe, join, join_segment_ids, response_window, take_rows
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState
from segjax.types import Experience, Rollout

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
  logprob, entropy = _read(token_logprobs, params, rollout, recipe.policy)
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


def _read(read, params, rollout: Rollout, config: LlamaConfig):
  """What a function of `heads` finds at each token of the responses, [B, T] each."""
  found = read(params, join(rollout), config, segment_ids=join_segment_ids(rollout))
  size = rollout.response_ids.shape[1]
  return jax.tree.map(lambda x: response_window(x, rollout.prompt_length, size), found)


def value_objective(
  params: Any, batch: Experience, count: Float[Array, ''], *, recipe: Recipe
) -> Found:
  """The clipped value loss of `rl.losses.value_loss` for these parameters."""
  rollout = batch.rollout
  value = _read(values, params, rollout, recipe.critic)
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


@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def policy_step(
  state: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  kl_coef: ScalarLike,
  *,
  recipe: Recipe,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the policy on the minibatch `rows` of the experience.

  Args:
    kl_coef: the coefficient of the KL, read where ppo.kl_in=loss.
    total_steps: updates of the policy in the whole run.
  """
  batch = take_rows(experience, rows)
  count = num_terms(batch.rollout.response_mask, recipe.ppo.loss_mean)
  (loss, metrics), grads = _value_and_grad(
    policy_objective, state.params, batch, recipe, count, kl_coef
  )
  state, update = apply_update(state, grads, loss, recipe.ppo.policy_optimizer, total_steps)
  return state, metrics | update


@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def critic_step(
  state: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  *,
  recipe: Recipe,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the critic on the minibatch `rows` of the experience."""
  batch = take_rows(experience, rows)
  count = num_terms(batch.value_mask, recipe.ppo.loss_mean)
  (loss, metrics), grads = _value_and_grad(value_objective, state.params, batch, recipe, count)
  state, update = apply_update(state, grads, loss, recipe.ppo.critic_optimizer, total_steps)
  return state, metrics | update


def _value_and_grad(objective, params, batch, recipe: Recipe, *rest):
  micro_batch, rows = recipe.ppo.micro_batch, len(batch.value)
  pieces = rows // micro_batch if micro_batch else 1
  objective = functools.partial(objective, recipe=recipe)
  return accumulate.value_and_grad(objective, params, batch, pieces, *rest)


def ppo_step(
  policy: TrainState,
  critic: TrainState,
  experience: Experience,
  rows: Int[np.ndarray, 'N'],
  kl_coef: ScalarLike,
  *,
  recipe: Recipe,
  total_steps: int,
  policy_from: int | None = 0,
) -> tuple[TrainState, TrainState, dict[str, Array]]:
  """One update of policy and critic on the minibatch `rows` of the experience; donates both.

  Metrics carry the prefixes policy/ and value/; `bad` counts updates that were not finite and
  were left out.

  Args:
    kl_coef: the coefficient of the KL, read where ppo.kl_in=loss.
    total_steps: updates of the critic in the whole run.
    policy_from: updates of the critic before the policy's first; None leaves the policy as it is.
  """
  metrics, bad = {}, 0
  if policy_from is not None:
    policy, found = policy_step(
      policy, experience, rows, kl_coef, recipe=recipe, total_steps=total_steps - policy_from
    )
    bad += found.pop('bad')
    metrics |= {f'policy/{key}': value for key, value in found.items()}
  critic, found = critic_step(critic, experience, rows, recipe=recipe, total_steps=total_steps)
  bad += found.pop('bad')
  metrics |= {f'value/{key}': value for key, value in found.items()}
  return policy, critic, metrics | {'bad': bad}
