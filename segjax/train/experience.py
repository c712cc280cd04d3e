"""Segments, dense rewards, KL penalty and advantages of a scored rollout; arrays only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.config.reward_lines import REWARD_MODEL
from segjax.config.settings import PPO
from segjax.rl import kl
from segjax.rl.learned_tokens import high_entropy_tokens
from segjax.rl.masked import masked_mean, whiten
from segjax.rl.rewards import shaped_reward
from segjax.train.estimators import estimate_advantages
from segjax.train.recipe import PPORecipe
from segjax.train.reward_mixing import ListedRewards, Parts, reward_parts
from segjax.train.reward_shaping import dense_rewards, segment_responses, segment_z
from segjax.train.rollout_metrics import part_metrics, rollout_metrics, z_by_position
from segjax.train.scoring import ModelOutputs
from segjax.types import Experience, Normalizer, Rollout, Segments


@functools.partial(jax.jit, static_argnames='recipe')
def make_experience(
  rollout: Rollout,
  outputs: ModelOutputs,
  normalizer: Normalizer,
  kl_coef: ScalarLike,
  custom_reward: Float[Array, 'B T'] | None = None,
  listed: ListedRewards | None = None,
  *,
  recipe: PPORecipe,
) -> tuple[Experience, dict[str, Array]]:
  """Computes the rewards and advantages of a rollout, and its metrics.

  reward_t = clip(dense_t) - kl_coef · kl_t, advantage by ppo.estimator, whitened over the rollout.
  With ppo.kl_placement=loss the reward has no KL term.

  Args:
    rollout: the responses.
    outputs: outputs of the networks over it; their `old_logprob` replaces that of the rollout.
    normalizer: normaliser of segment scores.
    kl_coef: coefficient of the KL penalty.
    custom_reward: the user's reward of each token, if there is one.
    listed: of config.rewards; None where it is empty.
    recipe: how responses are segmented and rewarded.
  """
  ppo, mask = recipe.ppo, rollout.response_mask
  rollout = dataclasses.replace(rollout, old_logprob=outputs.old_logprob)
  segments = segment_responses(rollout, outputs, outputs.score, recipe.segmenter, recipe.compat)
  z = segment_z(outputs, segments, rollout, normalizer, recipe.shaping)
  parts, disagreement = reward_parts(
    z, segments, rollout, outputs, custom_reward, listed, recipe=recipe
  )
  dense, parts = dense_rewards(parts, rollout, recipe=recipe), _present(parts, recipe)
  token_kl = kl.ESTIMATORS[ppo.kl_estimator](outputs.old_logprob, outputs.ref_logprob)
  reward = _shape(dense, token_kl, mask, kl_coef, recipe)
  estimate = estimate_advantages(reward, outputs.value, segments, mask, recipe)
  experience = Experience(
    rollout=rollout,
    ref_logprob=outputs.ref_logprob,
    ref_entropy=outputs.ref_entropy,
    score=outputs.score,
    segments=segments,
    reward=reward,
    advantage=whiten(estimate.advantage, mask) if ppo.whiten else estimate.advantage,
    value=outputs.value,
    return_=estimate.return_,
    value_mask=estimate.value_mask,
    learn_mask=_learn_mask(outputs.ref_entropy, segments, mask, ppo),
    parts=None if listed is None else parts,
  )
  penalty = kl_coef * token_kl if ppo.kl_placement == 'reward' else jnp.zeros_like(token_kl)
  metrics = rollout_metrics(experience, dense, penalty, recipe)
  if experience.learn_mask is not None:
    metrics['policy/learned_share'] = masked_mean(experience.learn_mask.astype(jnp.float32), mask)
  if recipe.has_scores:  # without a reward model there are no scores to normalise
    metrics |= z_by_position(z, segments)
  metrics |= part_metrics(parts, disagreement, segments, listed is not None)
  return experience, metrics


def _shape(
  dense: Float[Array, 'B T'],
  token_kl: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  kl_coef: ScalarLike,
  recipe: PPORecipe,
) -> Float[Array, 'B T']:
  """Clips the rewards, and charges the KL unless the loss does."""
  shape = functools.partial(
    shaped_reward,
    kl_coef=kl_coef if recipe.ppo.kl_placement == 'reward' else 0.0,
    clip=recipe.shaping.reward_clip or None,  # 0 in the settings: none
  )
  return jax.vmap(shape)(dense, token_kl, mask)


def _present(parts: Parts, recipe: PPORecipe) -> Parts:
  """Returns the parts without that of a reward model that there is not, which is 0."""
  return {name: x for name, x in parts.items() if name != REWARD_MODEL or recipe.has_scores}


def _learn_mask(
  ref_entropy: Float[Array, 'B T'], segments: Segments, mask: Bool[Array, 'B T'], ppo: PPO
) -> Bool[Array, 'B T'] | None:
  """Returns the tokens of the rollout that the policy is trained on; None for all."""
  if ppo.learn_on == 'segment_starts':
    return segments.start
  if ppo.learn_on == 'high_ref_entropy':
    # By the reference: the entropies of the sampling policy are not known without another pass.
    return high_entropy_tokens(ref_entropy, mask, ppo.learn_share)
  return None
