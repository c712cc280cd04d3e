"""The PPO update: clipped policy and value losses on one minibatch of a rollout."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from segjax.model.heads import token_logprobs, values
from segjax.rl.losses import policy_loss, value_loss
from segjax.rl.masked import masked_mean
from segjax.train.experience import Recipe, join, response_window, take_rows
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState
from segjax.types import Experience


def policy_objective(
  params: Any, batch: Experience, recipe: Recipe
) -> tuple[Array, dict[str, Array]]:
  """The clipped surrogate of `rl.losses.policy_loss` for these parameters."""
  rollout = batch.rollout
  logprob, entropy = (
    response_window(x, rollout.prompt_length, rollout.response_ids.shape[1])
    for x in token_logprobs(params, join(rollout), recipe.policy)
  )
  loss, metrics = policy_loss(
    logprob,
    rollout.old_logprob,
    batch.advantage,
    rollout.response_mask,
    clip_eps=recipe.ppo.clip_eps,
  )
  return loss, metrics | {'entropy': masked_mean(entropy, rollout.response_mask)}


def value_objective(
  params: Any, batch: Experience, recipe: Recipe
) -> tuple[Array, dict[str, Array]]:
  """The clipped value loss of `rl.losses.value_loss` for these parameters."""
  rollout = batch.rollout
  value = response_window(
    values(params, join(rollout), recipe.critic),
    rollout.prompt_length,
    rollout.response_ids.shape[1],
  )
  return value_loss(
    value,
    batch.value,
    batch.return_,
    rollout.response_mask,
    value_clip_eps=recipe.ppo.value_clip_eps,
  )


@functools.partial(
  jax.jit, static_argnames=('recipe', 'total_steps'), donate_argnames=('policy', 'critic')
)
def ppo_step(
  policy: TrainState,
  critic: TrainState,
  experience: Experience,
  rows: Int[Array, 'N'],
  *,
  recipe: Recipe,
  total_steps: int,
) -> tuple[TrainState, TrainState, dict[str, Array]]:
  """One update of policy and critic on the minibatch `rows` of the experience.

  Metrics carry the prefixes policy/ and value/; `bad` counts updates that were not finite and
  were left out.
  """
  batch = take_rows(experience, rows)
  metrics, states = {}, []
  for name, state, objective, optimizer in (
    ('policy', policy, policy_objective, recipe.ppo.policy_optimizer),
    ('value', critic, value_objective, recipe.ppo.critic_optimizer),
  ):
    (loss, found), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch, recipe)
    state, update = apply_update(state, grads, loss, optimizer, total_steps)
    states.append(state)
    found = {'loss': loss} | found | update
    metrics |= {f'{name}/{key}': value for key, value in found.items()}
  metrics['bad'] = metrics.pop('policy/bad') + metrics.pop('value/bad')
  return *states, metrics
