"""Describes the rewards of PPO in a line of the log."""

from segjax.rl.cuts import CUTS
from segjax.train.recipe import PPORecipe, RewardSource


def describe_rewards(recipe: PPORecipe, normalizer_kind: str) -> str:
  """Returns granularity, boundaries, normaliser and spread of the rewards as a line."""
  segmentation = recipe.segmenter.segmentation
  boundary = ''
  if segmentation.granularity == 'segment':
    detail = {
      'entropy_threshold': f' above {segmentation.entropy_threshold:g} nats',
      'segment_length': f' {segmentation.segment_length}',
      'probability_threshold': f' below {segmentation.probability_threshold:g}',
      'jump_threshold': f' above {segmentation.jump_threshold:g}',
    }
    options = CUTS[segmentation.boundary].options
    boundary = f' by {segmentation.boundary}' + ''.join(detail.get(name, '') for name in options)
  credit = ', min credit' if recipe.shaping.credit == 'min' else ''
  how, lm = recipe.shaping.redistribute, recipe.shaping.lm_reward
  redistributed = '' if how == 'none' else f', redistributed by {how}'
  added = f', {lm.kind} rewards of a language model by {lm.level}' if recipe.reward_lm else ''
  if recipe.rewards:
    added += '; further reward models: ' + ', '.join(map(_describe, recipe.rewards))
    added += ', read at the same segments' if recipe.shaping.mix == 'segment' else ''
  return (
    f'{segmentation.granularity} rewards{boundary}, {normalizer_kind} normaliser{redistributed}'
    f'{credit}, spread {recipe.spread}{added}'
  )


def _describe(source: RewardSource) -> str:
  """Returns name, weight and density of a reward model of config.rewards."""
  granularity = source.segmenter.segmentation.granularity
  return f'{source.name} ({source.weight:g} x {granularity}, spread {source.spread})'
