"""Advantages of a rollout by the estimator that the settings name, and what the critic learns."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from segjax.config.settings import PPO
from segjax.rl import critic_free
from segjax.rl.advantages import GAE_LEVELS, action_starts, length_adaptive_lambda, returns
from segjax.train.recipe import PPORecipe
from segjax.types import Segments


class Estimate(NamedTuple):
  """Advantages of one response, or of a batch.

  Attributes:
    advantage: before whitening.
    return_: what the critic learns; None without a critic.
    value_mask: states whose value it learns.
  """

  advantage: Float[Array, '*B T']
  return_: Float[Array, '*B T'] | None = None
  value_mask: Bool[Array, '*B T'] | None = None


def estimate_advantages(
  reward: Float[Array, 'B T'],
  value: Float[Array, 'B T'] | None,
  segments: Segments,
  mask: Bool[Array, 'B T'],
  recipe: PPORecipe,
) -> Estimate:
  """Returns the estimate of `ppo.estimator`.

  Args:
    reward: reward of each token.
    value: the critic's values; None without a critic.
    segments: the segments.
    mask: True on the response.
    recipe: the settings, and the responses to one prompt.
  """
  if recipe.ppo.has_critic:
    by_gae = functools.partial(_by_gae, ppo=recipe.ppo)
    return jax.vmap(by_gae)(reward, value, segments, mask)
  of_group = functools.partial(critic_free.ESTIMATORS[recipe.ppo.estimator], gamma=recipe.ppo.gamma)
  # Responses to one prompt are adjacent rows.
  groups = -1, recipe.samples_per_prompt, mask.shape[1]
  advantage = jax.vmap(of_group)(*(x.reshape(groups) for x in (reward, segments.start, mask)))
  return Estimate(advantage.reshape(mask.shape))


def _by_gae(
  reward: Float[Array, 'T'],
  value: Float[Array, 'T'],
  segments: Segments,
  mask: Bool[Array, 'T'],
  *,
  ppo: PPO,
) -> Estimate:
  """Returns the estimate of one response by GAE, over the actions of `ppo.gae_level`."""
  starts = mask if ppo.gae_level == 'token' else action_starts(segments, mask)
  level = functools.partial(GAE_LEVELS[ppo.gae_level], reward, value, starts, mask, gamma=ppo.gamma)
  gae_lambda = ppo.gae_lambda
  if ppo.lambda_length_factor:
    gae_lambda = length_adaptive_lambda(jnp.sum(starts), ppo.lambda_length_factor)
  advantage = for_critic = level(gae_lambda=gae_lambda)
  if ppo.lambda_length_factor or ppo.value_gae_lambda is not None:
    critic_lambda = ppo.gae_lambda if ppo.value_gae_lambda is None else ppo.value_gae_lambda
    for_critic = level(gae_lambda=critic_lambda)
  # Where segments are actions nothing is decided inside one, so values there have no target.
  value_mask = starts if ppo.gae_level == 'segment' else mask
  return Estimate(advantage, returns(for_critic, value, value_mask), value_mask)
