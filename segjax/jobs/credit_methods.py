"""The methods that the credit job compares: settings of the rewards, which go the way of PPO."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from segjax.config.conflicts import check_conflicts, check_redistribution, check_segments
from segjax.config.settings import Settings, replace
from segjax.data.row_forms import Message
from segjax.errors import UserError, one_line
from segjax.jobs import evaluate
from segjax.model.attribution import ATTRIBUTIONS
from segjax.run import recipes
from segjax.run.stage import Stage
from segjax.run.text_model import check_text_settings
from segjax.train import reward_spec
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import CollectedRollout
from segjax.train.rollout_scoring import score
from segjax.train.scoring import ModelOutputs
from segjax.train.segmenter import Segmenter
from segjax.train.text_reward import TextReward, cut_responses
from segjax.types import Normalizer

_SHAPING, _CUT = 'reward_shaping', 'reward_model.segmentation'
_SEGMENTS, _TOKENS = {f'{_CUT}.granularity': 'segment'}, {f'{_CUT}.granularity': 'token'}
# Parts of one score: a normaliser by position would change it from segment to segment.
_ONE_SCORE = {'reward_model.normalizer': 'none'}

CONFIGURED = 'as configured'
METHODS: dict[str, dict[str, Any]] = {
  CONFIGURED: {},
  'no normaliser': {'reward_model.normalizer': 'none'},
  'spread: end_only': {f'{_SHAPING}.spread': 'end_only'},
  'spread: repeat': {f'{_SHAPING}.spread': 'repeat'},
  'spread: entropy_weighted': {f'{_SHAPING}.spread': 'entropy_weighted'},
  'min credit': {f'{_SHAPING}.credit': 'min'},
  'cut: segments': _SEGMENTS | {f'{_SHAPING}.spread': 'even_split'},
  'cut: sentences': _SEGMENTS | {f'{_CUT}.boundary': 'delimiter'},
  'cut: 4 tokens': _SEGMENTS | {f'{_CUT}.boundary': 'fixed_length', f'{_CUT}.segment_length': 4},
  'cut: low probability': _SEGMENTS | {f'{_CUT}.boundary': 'low_probability'},
  'cut: score jumps': _SEGMENTS | {f'{_CUT}.boundary': 'score_jump'},
  'cut: shuffled': _SEGMENTS | {f'{_CUT}.boundary': 'shuffled_entropy'},
  'cut: random': _SEGMENTS | {f'{_CUT}.boundary': 'random'},
  'cut: tokens': _TOKENS | {f'{_SHAPING}.spread': 'even_split'},
  'cut: none': {f'{_CUT}.granularity': 'bandit', f'{_SHAPING}.spread': 'bandit'} | _ONE_SCORE,
  **{
    f'{how}: {unit}': granularity | _ONE_SCORE | {f'{_SHAPING}.redistribute': how}
    for how in ('red', 'gradient', 'attention')
    for unit, granularity in (('segments', _SEGMENTS), ('tokens', _TOKENS))
  },
}

SHAPLEY, SHAPLEY_CUTS = 'shapley: segments', 'red: segments'  # a yardstick, at a method's segments


class Method(NamedTuple):
  """How rewards are computed."""

  recipe: PPORecipe
  normalizer: Normalizer


def make_methods(stage: Stage, loaded: evaluate.Loaded) -> dict[str, Method]:
  """Returns the methods; those that the reward model cannot serve are left out with a line."""
  methods = {}
  for name, changes in METHODS.items():
    try:
      methods[name] = _make_method(replace(stage.settings, **changes), loaded)
    except UserError as error:
      if name == CONFIGURED:
        raise
      stage.log(f'{name} is left out: {one_line(error)}')
  if text := loaded.models.text_model:
    stage.log(
      f'{SHAPLEY} is left out: {text.path} reads text, and Shapley values are of the policy’s '
      'tokens.'
    )
  return methods


def _make_method(s: Settings, loaded: evaluate.Loaded) -> Method:
  paths, text = loaded.models.paths, loaded.models.text_model
  check_conflicts(s)
  if text is None:
    spec = reward_spec.resolve_spec(s.reward_model, paths['reward'], paths['policy'])
  else:
    spec = reward_spec.resolve_spec(s.reward_model, text.path, None)
    check_text_settings(s, spec.segmentation, text.path)
  check_redistribution(s, spec.segmentation.granularity, float(spec.normalizer.w_mean))
  check_segments(s, spec.segmentation.granularity)
  recipe = recipes.make_recipe(s, loaded.models._replace(reward_spec=spec), loaded.tokenizer)
  # Rewards alone are read: no critic is run.
  ppo = dataclasses.replace(s.ppo, estimator='reinforce_plus_plus', scoring_batch_size=0)
  recipe = dataclasses.replace(recipe, ppo=ppo, samples_per_prompt=1)
  return Method(recipe, jax.tree.map(jnp.float32, spec.normalizer))


def make_scorer(
  params: dict[str, Any],
  rollout: CollectedRollout,
  recipe: PPORecipe,
  text: TextReward | None,
  prompts: Sequence[Sequence[Message]],
) -> Callable[[PPORecipe], ModelOutputs]:
  """Returns a function of a method's recipe: the outputs of the networks over the responses.

  Methods whose scores are those of one forward pass share it. A model that reads text without tags
  is read at every token, where all methods find their ends; one that reads tags sees them where the
  method cuts, and has a pass for each way to cut.

  Args:
    params: parameters by name.
    rollout: the responses.
    recipe: of the methods, which differ in how responses are cut and rewarded.
    text: the reward model, if it reads text.
    prompts: messages of each response's prompt, for it.
  """

  @functools.cache
  def run_networks(redistribute: str) -> ModelOutputs:
    shaping = dataclasses.replace(recipe.shaping, redistribute=redistribute)
    own = dataclasses.replace(recipe, shaping=shaping)
    return score(params, rollout.arrays, rollout.length, recipe=own)

  @functools.cache
  def read_text(segmenter: Segmenter | None) -> ModelOutputs:
    read = run_networks('none')
    responses = text.carry_over(cut_responses(rollout, read, segmenter, recipe.compat))
    scored, of_prompt = text.score(params['reward'], prompts, responses)
    return read._replace(score=scored, prompt_score=of_prompt)

  def outputs(own: PPORecipe) -> ModelOutputs:
    if text is not None:
      return read_text(own.segmenter if text.scorer.marks.tag else None)
    how = own.shaping.redistribute
    return run_networks(how if how in ATTRIBUTIONS else 'none')

  return outputs
