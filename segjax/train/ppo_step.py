"""The PPO update: clipped policy and value losses on one minibatch of a rollout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax.model.heads import token_logprobs, values
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl import kl
from segjax.rl.losses import batch_mean, num_terms, policy_loss, value_loss
from segjax.train import gradient_accumulation
from segjax.train.experience import (
  PPORecipe,
  attention_segment_ids,
  concat_prompt_response,
  gather_response,
  take_rows,
)
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState
from segjax.types import Experience, PackingPlan, PackingSlots, Rollout

LossAndMetrics = tuple[Array, dict[str, Array]]  # a loss and its metrics


def policy_objective(
  params: Any,
  batch: Experience,
  count: Float[Array, ''],
  kl_coef: ScalarLike,
  *,
  recipe: PPORecipe,
  places: PackingSlots | None = None,
) -> LossAndMetrics:
  """The clipped surrogate, less the entropy bonus, plus the KL penalty where it is in the loss.

  Args:
    count: `num_terms` of the whole minibatch of which `batch` may be a part.
    kl_coef: the coefficient of the KL, for ppo.kl_placement=loss.
    places: of the sequences in packed rows.
  """
  ppo, rollout = recipe.ppo, batch.rollout
  mask = _real(rollout.response_mask, places)
  logprob, entropy = _run_model(token_logprobs, params, rollout, recipe.policy, places)
  mean = functools.partial(batch_mean, mask=mask, mean=ppo.loss_aggregation, count=count)
  loss, metrics = policy_loss(
    logprob,
    rollout.old_logprob,
    batch.advantage,
    mask,
    clip_eps=ppo.clip_eps,
    clip_eps_high=ppo.clip_eps_high or None,
    dual_clip=ppo.dual_clip_ratio or None,
    mean=ppo.loss_aggregation,
    count=count,
  )
  metrics['entropy'] = mean(entropy)
  if ppo.entropy_coef:
    loss = loss - ppo.entropy_coef * metrics['entropy']
  if ppo.kl_placement == 'loss':
    # Masked first: garbage under the mask could overflow.
    difference = jnp.where(mask, logprob, 0), jnp.where(mask, batch.ref_logprob, 0)
    metrics['kl'] = mean(kl.ESTIMATORS[ppo.kl_estimator](*difference))
    loss = loss + kl_coef * metrics['kl']
  return loss, {'loss': loss} | metrics


def _real(mask: Bool[Array, 'B T'], places: PackingSlots | None) -> Bool[Array, 'B T']:
  """The mask without the rows that stand for none."""
  return mask if places is None else mask & (places.length > 0)[:, None]


def _run_model(
  function, params, rollout: Rollout, config: LlamaConfig, places: PackingSlots | None
):
  """What a function of `heads` finds at each token of the responses, [B, T] each."""
  found = run_packed(
    function,
    params,
    concat_prompt_response(rollout),
    config,
    places,
    attention_segment_ids(rollout),
  )
  size = rollout.response_ids.shape[1]
  return jax.tree.map(lambda x: gather_response(x, rollout.prompt_length, size), found)


def value_objective(
  params: Any,
  batch: Experience,
  count: Float[Array, ''],
  *,
  recipe: PPORecipe,
  places: PackingSlots | None = None,
) -> LossAndMetrics:
  """The clipped value loss of `rl.losses.value_loss` for these parameters."""
  value = _run_model(values, params, batch.rollout, recipe.critic, places)
  loss, metrics = value_loss(
    value,
    batch.value,
    batch.return_,
    _real(batch.value_mask, places),
    value_clip_eps=recipe.ppo.value_clip_eps or None,
    mean=recipe.ppo.loss_aggregation,
    count=count,
  )
  return loss, {'loss': loss} | metrics


@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def policy_step(
  state: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  kl_coef: ScalarLike,
  packing: PackingPlan | None = None,
  allowed: Bool[Array, ''] | bool = True,
  *,
  recipe: PPORecipe,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the policy on the minibatch `rows` of the experience.

  Args:
    kl_coef: the coefficient of the KL, read where ppo.kl_placement=loss.
    packing: of the minibatch, where ppo.packing_length says so.
    allowed: whether the rollout may be learned from.
    total_steps: updates of the policy in the whole run.
  """
  batch = take_rows(experience, rows)
  count = num_terms(batch.rollout.response_mask, recipe.ppo.loss_aggregation)
  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    functools.partial(policy_objective, recipe=recipe),
    *(state.params, batch, recipe.ppo.micro_batch_size, packing, count, kl_coef),
  )
  optimizer = recipe.ppo.policy_optimizer
  state, update = apply_update(state, grads, loss, optimizer, total_steps, allowed)
  return state, metrics | update


@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def critic_step(
  state: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  packing: PackingPlan | None = None,
  allowed: Bool[Array, ''] | bool = True,
  *,
  recipe: PPORecipe,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the critic on the minibatch `rows` of the experience."""
  batch = take_rows(experience, rows)
  count = num_terms(batch.value_mask, recipe.ppo.loss_aggregation)
  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    functools.partial(value_objective, recipe=recipe),
    *(state.params, batch, recipe.ppo.micro_batch_size, packing, count),
  )
  optimizer = recipe.ppo.critic_optimizer
  state, update = apply_update(state, grads, loss, optimizer, total_steps, allowed)
  return state, metrics | update


def ppo_step(
  policy: TrainState,
  critic: TrainState,
  experience: Experience,
  rows: Int[np.ndarray, 'N'],
  kl_coef: ScalarLike,
  packing: PackingPlan | None = None,
  allowed: Bool[Array, ''] | bool = True,
  *,
  recipe: PPORecipe,
  total_steps: int,
  policy_from: int | None = 0,
) -> tuple[TrainState, TrainState, dict[str, Array]]:
  """One update of policy and critic on the minibatch `rows` of the experience; donates both.

  Metrics carry the prefixes policy/ and val/; `bad` counts updates that were left out, for they
  were not finite or not allowed.

  Args:
    kl_coef: the coefficient of the KL, read where ppo.kl_placement=loss.
    packing: of the minibatch, where ppo.packing_length says so.
    allowed: whether the rollout may be learned from.
    total_steps: updates of the critic in the whole run.
    policy_from: updates of the critic before the policy's first; None leaves the policy as it is.
  """
  metrics, bad = {}, 0
  if policy_from is not None:
    policy, found = policy_step(
      *(policy, experience, rows, kl_coef, packing, allowed),
      recipe=recipe,
      total_steps=total_steps - policy_from,
    )
    bad += found.pop('skipped_updates')
    metrics |= {f'policy/{key}': value for key, value in found.items()}
  critic, found = critic_step(
    *(critic, experience, rows, packing, allowed), recipe=recipe, total_steps=total_steps
  )
  bad += found.pop('skipped_updates')
  metrics |= {f'critic/{key}': value for key, value in found.items()}
  return policy, critic, metrics | {'skipped_updates': bad}
