"""The PPO update: clipped policy and value losses on one minibatch of a rollout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.model.heads import token_logprobs, values
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl import kl
from segjax.rl.logprobs import log_ratio
from segjax.rl.losses import (
  batch_mean,
  importance_weights,
  num_terms,
  policy_loss,
  value_loss,
)
from segjax.train import gradient_accumulation
from segjax.train.gradient_accumulation import LossAndMetrics
from segjax.train.metrics import Metrics
from segjax.train.optimizer import TrainState, apply_update
from segjax.train.recipe import PPORecipe
from segjax.train.rollout_rows import (
  attention_segment_ids,
  carried_mask,
  concat_prompt_response,
  gather_response,
  take_rows,
)
from segjax.types import Experience, PackingPlan, PackingSlots, Rollout


class Minibatch(NamedTuple):
  """The part of an experience that one update learns from.

  Attributes:
    experience: the whole rollout.
    rows: indices of the minibatch's rows in axis 0 of `experience`.
    packing: how the minibatch is packed; None for one row per sequence.
    enabled: whether to learn from the rollout; otherwise the states stay as they are.
  """

  experience: Experience
  rows: Any  # int[N], on the host or on the devices
  packing: PackingPlan | None = None
  enabled: Bool[Array, ''] | bool = True


def policy_objective(
  params: Any,
  batch: Experience,
  count: Float[Array, ''],
  kl_coef: ScalarLike,
  *,
  recipe: PPORecipe,
  slots: PackingSlots | None = None,
) -> LossAndMetrics:
  """Computes the clipped surrogate, less the entropy bonus, plus the KL penalty if in the loss.

  Each is a mean over the tokens of `Experience.policy_mask`.

  Args:
    params: parameters of the policy.
    batch: rows of the minibatch.
    count: `num_terms` of the whole minibatch, of which `batch` may be a piece.
    kl_coef: coefficient of the KL penalty, read with ppo.kl_placement=loss.
    recipe: network and loss.
    slots: slots of the sequences in packed rows; None for one row per sequence.
  """
  ppo, rollout = recipe.ppo, batch.rollout
  mask = _without_empty_slots(batch.policy_mask, slots)
  logprob, policy_entropy = _run_model(token_logprobs, params, rollout, recipe.policy, slots)
  averaged = {'mean': ppo.loss_aggregation, 'count': count}
  mean = functools.partial(batch_mean, mask=mask, **averaged)
  advantage, importance = batch.advantage, {}
  if ppo.importance_clip:
    weights, importance = importance_weights(
      rollout.old_logprob, rollout.sample_logprob, mask, ppo.importance_clip, **averaged
    )
    advantage = advantage * weights
  loss, metrics = policy_loss(
    logprob,
    rollout.old_logprob,
    advantage,
    mask,
    clip_eps=ppo.clip_eps or None,  # 0 in the settings: none
    clip_eps_high=ppo.clip_eps_high or None,
    dual_clip=ppo.dual_clip_ratio or None,
    **averaged,
  )
  metrics |= importance
  # The maximum over the pieces of a minibatch is not their sum.
  maxima = {'ratio_max_deviation': metrics.pop('ratio_max_deviation')}
  if rollout.carried is not None:
    # Apart from the tokens of earlier policies, whose ratio is not 1 before the first update.
    deviation = jnp.abs(jnp.expm1(log_ratio(logprob, rollout.old_logprob)))
    is_own = mask & ~carried_mask(rollout)
    maxima['own_ratio_max_deviation'] = jnp.max(jnp.where(is_own, deviation, 0), initial=0)
  metrics['entropy'] = mean(policy_entropy)
  if ppo.entropy_coef:
    loss = loss - ppo.entropy_coef * metrics['entropy']
  if ppo.kl_placement == 'loss':
    # Masked before the exponential of the estimator, where values under the mask could overflow.
    logprobs = jnp.where(mask, logprob, 0), jnp.where(mask, batch.ref_logprob, 0)
    metrics['kl'] = mean(kl.ESTIMATORS[ppo.kl_estimator](*logprobs))
    loss = loss + kl_coef * metrics['kl']
  return loss, Metrics(mean={'loss': loss} | metrics, max=maxima)


def _without_empty_slots(
  mask: Bool[Array, 'B T'], slots: PackingSlots | None
) -> Bool[Array, 'B T']:
  """Returns the mask, False in rows that only fill an empty slot."""
  # Such a row is a copy of row 0, whose tokens would be learned twice.
  return mask if slots is None else mask & (slots.length > 0)[:, None]


def _run_model(
  function: Callable[..., Any],
  params: Any,
  rollout: Rollout,
  config: LlamaConfig,
  slots: PackingSlots | None,
) -> Any:
  """Returns the outputs of a function of `heads` at each response token, [B, T] each."""
  outputs = run_packed(
    function,
    params,
    concat_prompt_response(rollout),
    config,
    slots,
    attention_segment_ids(rollout),
  )
  # Unpacked before the loss: rewards and advantages are aligned with responses, not with slots.
  size = rollout.response_ids.shape[1]
  return jax.tree.map(lambda x: gather_response(x, rollout.prompt_length, size), outputs)


def value_objective(
  params: Any,
  batch: Experience,
  count: Float[Array, ''],
  *,
  recipe: PPORecipe,
  slots: PackingSlots | None = None,
) -> LossAndMetrics:
  """Computes the clipped value loss, `rl.losses.value_loss`; see `policy_objective`."""
  value = _run_model(values, params, batch.rollout, recipe.critic, slots)
  loss, metrics = value_loss(
    value,
    batch.value,
    batch.return_,
    _without_empty_slots(batch.value_mask, slots),
    value_clip_eps=recipe.ppo.value_clip_eps or None,
    mean=recipe.ppo.loss_aggregation,
    count=count,
  )
  return loss, Metrics(mean={'loss': loss} | metrics)


# Donated: the state of a large model would not fit twice, before and after the update.
@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def policy_step(
  state: TrainState,
  minibatch: Minibatch,
  kl_coef: ScalarLike,
  base: Any = None,
  *,
  recipe: PPORecipe,
  total_steps: int,
) -> tuple[TrainState, Metrics]:
  """Updates the policy on a minibatch.

  Args:
    state: state of the policy; donated.
    minibatch: the rows to learn from.
    kl_coef: coefficient of the KL penalty, read with ppo.kl_placement=loss.
    base: frozen parameters of the network, where adapters are trained.
    recipe: network, loss and optimizer.
    total_steps: updates of the policy in the whole run.
  """
  # The rows are an argument, so that all minibatches of a run share one program.
  batch = take_rows(minibatch.experience, minibatch.rows)
  # Of the minibatch: a mean per piece would weigh a sequence by how full its piece is.
  count = num_terms(batch.policy_mask, recipe.ppo.loss_aggregation)
  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    functools.partial(policy_objective, recipe=recipe),
    state.params,
    batch,
    _rows_at_once(batch, recipe),
    minibatch.packing,
    count,
    kl_coef,
    base=base,
  )
  optimizer = recipe.ppo.policy_optimizer
  state, update = apply_update(state, grads, loss, optimizer, total_steps, minibatch.enabled)
  return state, metrics.merge(update)


@functools.partial(jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames='state')
def critic_step(
  state: TrainState,
  minibatch: Minibatch,
  base: Any = None,
  *,
  recipe: PPORecipe,
  total_steps: int,
) -> tuple[TrainState, Metrics]:
  """Updates the critic on a minibatch; see `policy_step`."""
  batch = take_rows(minibatch.experience, minibatch.rows)
  # Not the count of the policy: the critic learns fewer states where actions are segments.
  count = num_terms(batch.value_mask, recipe.ppo.loss_aggregation)
  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    functools.partial(value_objective, recipe=recipe),
    state.params,
    batch,
    _rows_at_once(batch, recipe),
    minibatch.packing,
    count,
    base=base,
  )
  optimizer = recipe.ppo.critic_optimizer
  state, update = apply_update(state, grads, loss, optimizer, total_steps, minibatch.enabled)
  return state, metrics.merge(update)


def _rows_at_once(batch: Experience, recipe: PPORecipe) -> int:
  (rows, prompt), response = batch.rollout.prompt_ids.shape, batch.rollout.response_ids.shape[1]
  return gradient_accumulation.rows_at_once(recipe.ppo, rows, prompt + response)


def ppo_step(
  states: dict[str, TrainState],
  bases: dict[str, Any],
  minibatch: Minibatch,
  kl_coef: ScalarLike,
  *,
  recipe: PPORecipe,
  total_steps: int,
  policy_from: int | None = 0,
) -> tuple[dict[str, TrainState], Metrics]:
  """Updates the policy, and the critic if there is one, on a minibatch; donates their states.

  Metrics have the prefixes policy/ and critic/; `skipped_updates` counts the updates that were
  skipped because they were not finite or not enabled.

  Args:
    states: of 'policy' and, where there is one, 'critic'.
    bases: frozen parameters of those that are trained by adapters.
    minibatch: the rows to learn from.
    kl_coef: coefficient of the KL penalty, read with ppo.kl_placement=loss.
    recipe: networks, losses and optimizers.
    total_steps: updates in the whole run.
    policy_from: updates of the critic before the policy's first; None leaves the policy as it is.
  """
  states, metrics, skipped = dict(states), Metrics(), 0
  # Two programs, so that the warm-up of the critic does not compile the policy's.
  if policy_from is not None:
    # The policy's schedule starts with its first update, not in the warm-up of the critic.
    states['policy'], update = policy_step(
      states['policy'],
      minibatch,
      kl_coef,
      bases.get('policy'),
      recipe=recipe,
      total_steps=total_steps - policy_from,
    )
    skipped += update.sum.pop('skipped_updates')  # one count for both networks
    metrics = metrics.merge(update.prefix('policy'))
  if recipe.critic is not None:
    states['critic'], update = critic_step(
      states['critic'], minibatch, bases.get('critic'), recipe=recipe, total_steps=total_steps
    )
    skipped += update.sum.pop('skipped_updates')
    metrics = metrics.merge(update.prefix('critic'))
  return states, metrics.merge(Metrics(sum={'skipped_updates': skipped}))
