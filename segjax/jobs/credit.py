"""Ranks methods of dense reward by the credit that they give to the clauses of responses.

The true credit is that of config.evaluate.credit_fn, or of continuations that the policy samples,
so that no PPO run is needed. A method is a line of `METHODS`: settings of the rewards, which go the
way of PPO itself.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from segjax import processes
from segjax.config.conflicts import check_conflicts, check_redistribution, check_segments
from segjax.config.settings import Evaluate, Settings, replace
from segjax.data import study_languages
from segjax.errors import UserError, excerpt, one_line
from segjax.evaluation.clause_credit import (
  Clauses,
  clause_ends,
  clause_figures,
  make_clauses,
)
from segjax.evaluation.intervals import format_interval
from segjax.jobs import evaluate, evaluate_functions
from segjax.jobs.job import COMMON, LM_REWARD, POLICY, REFERENCE, REWARD_MODEL, Job, data_input
from segjax.report.console import table
from segjax.run import inputs, models, recipes
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.storage import write_text_atomically
from segjax.train import reward_spec
from segjax.train.continuations import Prefix, continuation_credit, prefix_values
from segjax.train.experience import make_experience
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import CollectedRollout, response_tokens
from segjax.train.scoring import score
from segjax.train.shapley import segment_worth, shapley_values
from segjax.types import Experience, Normalizer

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

_SHAPLEY_CUTS = 'red: segments'  # the method whose segments and reward model have Shapley values
_SHAPLEY_ORDERS = 8


class Method(NamedTuple):
  """How rewards are computed."""

  recipe: PPORecipe
  normalizer: Normalizer


def load(stage: Stage) -> evaluate.Loaded:
  """Loads all but weights, and checks that a true credit is given."""
  _check_functions(stage.settings.evaluate)
  if stage.settings.rewards:
    raise UserError(
      'config.rewards has no effect in credit, which compares ways to read one reward model, that '
      'of config.reward_model; leave it out.'
    )
  loaded = evaluate.load_collector(stage)
  if loaded.models.text_model is not None:
    raise UserError(
      f'{loaded.models.text_model.path} reads text, and methods are compared by a reward model '
      'that reads the policy’s tokens; name one in config.reward_model.path.'
    )
  return loaded


def _check_functions(settings: Evaluate) -> None:
  if not settings.continuations:
    evaluate_functions.check_credit(settings)
  elif not settings.gold_reward_fn:
    raise UserError(
      f'config.evaluate.continuations={settings.continuations} asks what continuations earn; set '
      "evaluate.gold_reward_fn to 'module:function'."
    )


def run(stage: Stage, loaded: evaluate.Loaded) -> dict[str, Any]:
  """Samples responses of the policy and compares the credit of each of `METHODS` with the true one.

  Returns:
    The figures of each method, also written to `credit.json`, and the number of clauses.
  """
  s, collector = stage.settings, loaded.collector
  methods = _make_methods(stage, loaded)
  params = models.load_models(
    loaded.models, tuple(loaded.models.paths), Weights(s.runtime, stage.mesh)
  )
  rows = np.repeat(np.arange(len(collector.prompts)), s.evaluate.samples_per_prompt)
  rows = rows[: len(rows) // stage.mesh.size * stage.mesh.size]
  rollout = collector.collect(params, rows, stage.key('samples'), jnp.float32(0)).rollout
  outputs = _make_scorer(params, rollout, collector.recipe)

  def experience_of(method: Method) -> Experience:
    scored = outputs(method.recipe.shaping.redistribute)
    recipe = method.recipe
    return make_experience(
      rollout.arrays, scored, method.normalizer, jnp.float32(0), recipe=recipe
    )[0]

  clauses = _find_clauses(stage, loaded, params['policy'], experience_of(methods[CONFIGURED]), rows)
  figures = {}
  for name, method in methods.items():
    experience = experience_of(method)
    figures[name] = clause_figures(processes.to_host(experience.reward), clauses, s.seed)
    if name == _SHAPLEY_CUTS:
      reward = _shapley_rewards(params['reward'], experience, method.recipe, s.seed)
      figures['shapley: segments'] = clause_figures(reward, clauses, s.seed)
  if processes.is_first():
    record = json.dumps(figures, indent=2) + '\n'
    write_text_atomically(stage.directory / 'credit.json', record)
  return {'methods': figures, 'clauses': len(clauses.truth), 'responses': len(rows)}


def _find_clauses(
  stage: Stage, loaded: evaluate.Loaded, policy: Any, experience: Experience, rows: np.ndarray
) -> Clauses:
  """Returns the clauses of the responses, or their segments, with their true credit.

  Args:
    policy: parameters of the policy, which samples continuations.
    experience: of the responses.
    rows: the row of each response's prompt.
  """
  settings, collector, decode = stage.settings.evaluate, loaded.collector, loaded.tokenizer.decode
  # The gold reward of each response, or the true credit of each of its clauses.
  make = evaluate_functions.load_gold if settings.continuations else evaluate_functions.load_credit
  worth, is_boundary = make(stage.settings, decode), evaluate_functions.load_boundary(settings)
  rollout, segment_end = processes.to_host((experience.rollout, experience.segments.end))
  ends = segment_end if is_boundary is None else clause_ends(rollout, decode, is_boundary)
  ids, mask = rollout.response_ids, rollout.response_mask
  responses = collector.responses(rows, response_tokens(rollout))
  values = worth(responses)
  if not settings.continuations:
    if not any(values):
      raise UserError(
        f'config.evaluate.credit_fn={settings.credit_fn} knows no credit of responses to prompts '
        f'such as {excerpt(responses.prompts[0])}; use prompts of config.demo.language='
        f'{", ".join(study_languages.LANGUAGES)}, or evaluate.continuations with any gold reward.'
      )
    return make_clauses(mask, ends, values)

  def value(prefixes: list[Prefix]) -> np.ndarray:
    return prefix_values(
      policy,
      functools.partial(collector.prompts.gather, to_device=np.asarray),
      prefixes,
      lambda rows, ids: worth(collector.responses(rows, ids)),
      key=stage.key('continuations'),
      sampler=dataclasses.replace(collector.sampler, samples_per_prompt=settings.continuations),
      batches=inputs.tracked_batches(
        stage.name, len(prefixes), settings.batch_size, 'continuations'
      ),
    )

  return make_clauses(mask, ends, continuation_credit(rows, ids, ends, values, value))


def _shapley_rewards(
  params: Any, experience: Experience, recipe: PPORecipe, seed: int
) -> Float[np.ndarray, 'R T']:
  """Returns the Shapley value of each segment, at its last token: a yardstick, not a method."""
  segments = processes.to_host(experience.segments)
  worth = segment_worth(params, experience.rollout, experience.segments.segment_id, recipe.reward)
  values = shapley_values(worth, segments.num_segments, _SHAPLEY_ORDERS, seed)
  index = np.maximum(segments.segment_id, 0)
  return np.where(segments.end, np.take_along_axis(values, index, axis=1), 0)


def _make_methods(stage: Stage, loaded: evaluate.Loaded) -> dict[str, Method]:
  """Returns the methods; those that the reward model cannot serve are left out with a line."""
  methods = {}
  for name, changes in METHODS.items():
    try:
      methods[name] = _make_method(replace(stage.settings, **changes), loaded)
    except UserError as error:
      if name == CONFIGURED:
        raise
      stage.log(f'{name} is left out: {one_line(error)}')
  return methods


def _make_method(s: Settings, loaded: evaluate.Loaded) -> Method:
  paths = loaded.models.paths
  check_conflicts(s)
  spec = reward_spec.resolve_spec(s.reward_model, paths['reward'], paths['policy'])
  check_redistribution(s, spec.segmentation.granularity, float(spec.normalizer.w_mean))
  check_segments(s, spec.segmentation.granularity)
  recipe = recipes.make_recipe(s, loaded.models._replace(reward_spec=spec), loaded.tokenizer)
  # Rewards alone are read: no critic is run.
  ppo = dataclasses.replace(s.ppo, estimator='reinforce_plus_plus', scoring_batch_size=0)
  recipe = dataclasses.replace(recipe, ppo=ppo, samples_per_prompt=1)
  return Method(recipe, jax.tree.map(jnp.float32, spec.normalizer))


def _make_scorer(
  params: dict[str, Any], rollout: CollectedRollout, recipe: PPORecipe
) -> Callable[[str], Any]:
  """Returns a function of reward_shaping.redistribute, the only choice that scoring reads."""

  @functools.cache
  def outputs(redistribute):
    shaping = dataclasses.replace(recipe.shaping, redistribute=redistribute)
    own = dataclasses.replace(recipe, shaping=shaping)
    return score(params, rollout.arrays, rollout.length, recipe=own)

  return lambda how: outputs(how if how in ('gradient', 'attention') else 'none')


def print_table(results: dict[str, Any]) -> None:
  """Prints the methods, the best first.

  ranks: Spearman's correlation within a response, of rewards and of the return to go. signs: share
  of clauses with the right one. error: 1 is that of no credit. decides: share of the credit on the
  last token of a clause.
  """
  columns = {
    'spearman': 'ranks',
    'sign': 'signs',
    'error': 'error',
    'on_deciding_token': 'decides',
    'advantage_spearman': 'return to go',
  }
  ranked = sorted(results['methods'].items(), key=lambda item: -(item[1]['spearman']['mean'] or 0))

  def cell(key, estimate):
    # Intervals of all would not fit the width of a terminal.
    estimate = estimate if key.endswith('spearman') else estimate | {'low': None}
    return format_interval(estimate, 2)

  rows = [(name, *(cell(key, figures[key]) for key in columns)) for name, figures in ranked]
  title = f'Credit of {results["clauses"]:,} clauses against the true one, means [95 % intervals]'
  table(title, ('', *columns.values()), rows)


JOB = Job(
  name='credit',
  load=load,
  run=run,
  sections=(
    *COMMON,
    'policy',
    'reference',
    'reward_model',
    'rollout',
    'reward_shaping',
    'ppo',
    'evaluate',
  ),
  inputs=(POLICY, REFERENCE, REWARD_MODEL, LM_REWARD, data_input('held_out')),
  functions=lambda s: (
    'evaluate.credit_fn',
    'evaluate.gold_reward_fn',
    'evaluate.boundary_fn',
    'reward_model.segmentation.boundary_fn',
  ),
  outputs=('credit.json',),
  print_table=print_table,
  summary=('clauses',),
  num_networks=lambda s: 3,
)
