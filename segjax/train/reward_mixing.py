"""Mixes the rewards of several sources: reward models, functions of the user's, a language model.

The reward model of config.reward_model is the first; those of config.rewards follow.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.reward_lines import DISAGREEMENT, LM_REWARD, REWARD_FN, REWARD_MODEL
from segjax.train.recipe import PPORecipe
from segjax.train.reward_shaping import (
  credited,
  lm_rewards,
  normalized,
  segment_responses,
  spread_rewards,
)
from segjax.train.scoring import ModelOutputs
from segjax.types import Normalizer, Rollout, Segments

Parts = dict[str, Float[Array, 'B T']]


class ListedRewards(NamedTuple):
  """What the lines of config.rewards give for a rollout, by name.

  Attributes:
    normalizers: of the reward models' scores.
    functions: rewards of tokens by functions, times their weights.
  """

  normalizers: dict[str, Normalizer]
  functions: Parts


def reward_parts(
  z: Float[Array, 'B T'],
  segments: Segments,
  rollout: Rollout,
  outputs: ModelOutputs,
  custom_reward: Float[Array, 'B T'] | None,
  listed: ListedRewards | None,
  *,
  recipe: PPORecipe,
) -> tuple[Parts, Float[Array, 'B T'] | None]:
  """Returns the part of each source in the rewards of tokens, and the models' disagreement.

  The parts add up to the rewards before penalties: of reward models as `_model_parts` says, then
  reward_fn_weight · custom_reward, the functions of config.rewards, and those of a language model.

  Args:
    z: `segment_z` of the first reward model.
    segments: its segments.
    rollout: the responses.
    outputs: of the networks.
    custom_reward: by reward_shaping.reward_fn of each token, if there is one.
    listed: of config.rewards; None where it is empty.
    recipe: the reward models and how they are mixed.

  Returns:
    The parts by name, that of the first reward model in front, and `disagreement` at the segments
    of the first model; None with one reward model.
  """
  lm_reward = lm_rewards(outputs, segments, rollout, recipe=recipe)
  normalizers = {} if listed is None else listed.normalizers
  parts, deviation = _model_parts(z, segments, rollout, outputs, normalizers, recipe)
  if custom_reward is not None:
    parts[REWARD_FN] = recipe.shaping.reward_fn_weight * custom_reward
  if listed is not None:
    parts |= listed.functions
  if lm_reward is not None:
    parts[LM_REWARD] = lm_reward
  return parts, deviation


def disagreement(z: list[Float[Array, 'B T']]) -> Float[Array, 'B T']:
  """Returns s = sqrt(Σ_i (z_i - mean z)² / n), the standard deviation over n reward models.

  z are their normalised scores of the same segments, so that their units are comparable.
  """
  return jnp.std(jnp.stack(z), axis=0)


def _model_parts(
  z: Float[Array, 'B T'],
  segments: Segments,
  rollout: Rollout,
  outputs: ModelOutputs,
  normalizers: dict[str, Normalizer],
  recipe: PPORecipe,
) -> tuple[Parts, Float[Array, 'B T'] | None]:
  """Returns the part of each reward model, and the disagreement of all of them.

  With mix=token, each model i is read at its own segments and spread by its own density:
  part_i = w_i spread_i(credit(z_i)). With mix=segment, all models are read at the segments of the
  first one, and what they add up to is credited and spread once, as the first one's:

    z_j = Σ_i w_i z_ij - c W s_j,  W = Σ_i w_i,

  where s_j is the `disagreement` about segment j, over all models whatever their weights, and c is
  reward_shaping.disagreement_coef. With equal weights this is W times mean minus c times standard
  deviation: a lower confidence bound in place of the ensemble's mean, against over-optimisation.
  Coste et al. 2023 (https://arxiv.org/abs/2310.02743, "uncertainty-weighted optimization") subtract
  the variance instead, which has another unit than the rewards.
  """
  shaping = recipe.shaping

  def spread(z, segments, source):
    return spread_rewards(z, segments, rollout, outputs.ref_entropy, source, shaping)

  if not recipe.rewards:
    earned = spread(credited(z, segments, shaping), segments, recipe)
    return {REWARD_MODEL: shaping.reward_model_weight * earned}, None
  weights = {REWARD_MODEL: shaping.reward_model_weight}
  weights |= {source.name: source.weight for source in recipe.rewards}
  same = {REWARD_MODEL: z} | {
    source.name: normalized(
      outputs.scores[source.name], segments, normalizers[source.name], shaping
    )
    for source in recipe.rewards
  }
  deviation = disagreement(list(same.values()))
  if shaping.mix == 'segment':
    weighted = {name: weights[name] * own for name, own in same.items()}
    if shaping.disagreement_coef:
      weighted[DISAGREEMENT] = -shaping.disagreement_coef * sum(weights.values()) * deviation
    total = sum(weighted.values())
    parts = {
      name: spread(credited(total, segments, shaping, part), segments, recipe)
      for name, part in weighted.items()
    }
    return parts, deviation
  earned = spread(credited(z, segments, shaping), segments, recipe)
  parts = {REWARD_MODEL: shaping.reward_model_weight * earned}
  for source in recipe.rewards:
    score = outputs.scores[source.name]
    own = segment_responses(rollout, outputs, score, source.segmenter, recipe.compat)
    own_z = normalized(score, own, normalizers[source.name], shaping)
    parts[source.name] = source.weight * spread(credited(own_z, own, shaping), own, source)
  return parts, deviation
