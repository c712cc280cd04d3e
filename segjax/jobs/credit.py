"""Ranks methods of dense reward by the credit that they give to the clauses of responses.

The true credit is that of config.evaluate.credit_fn, or of continuations that the policy samples,
so that no PPO run is needed.
"""

import dataclasses
import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from segjax import processes
from segjax.config.settings import Evaluate
from segjax.data import study_languages
from segjax.errors import UserError, excerpt
from segjax.evaluation.clause_credit import (
  Clauses,
  clause_ends,
  clause_figures,
  make_clauses,
)
from segjax.evaluation.intervals import format_interval
from segjax.jobs import evaluate, evaluate_functions
from segjax.jobs.credit_methods import (
  CONFIGURED,
  SHAPLEY,
  SHAPLEY_CUTS,
  Method,
  make_methods,
  make_scorer,
)
from segjax.jobs.job import COMMON, LM_REWARD, POLICY, REFERENCE, REWARD_MODEL, Job, data_input
from segjax.report.console import table
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.storage import write_text_atomically
from segjax.train.continuations import Prefix, continuation_credit, prefix_values
from segjax.train.experience import make_experience
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import response_tokens
from segjax.train.shapley import segment_worth, shapley_values
from segjax.types import Experience

_SHAPLEY_ORDERS = 8


def load(stage: Stage) -> evaluate.Loaded:
  """Loads all but weights, and checks that a true credit is given."""
  _check_functions(stage.settings.evaluate)
  if stage.settings.rewards:
    raise UserError(
      'config.rewards has no effect in credit, which compares ways to read one reward model, that '
      'of config.reward_model; leave it out.'
    )
  return evaluate.load_collector(stage)


def _check_functions(settings: Evaluate) -> None:
  if not settings.continuations:
    evaluate_functions.check_credit(settings)
  elif not settings.gold_reward_fn:
    raise UserError(
      f'config.evaluate.continuations={settings.continuations} asks what continuations earn; set '
      "evaluate.gold_reward_fn to 'module:function'."
    )


def run(stage: Stage, loaded: evaluate.Loaded) -> dict[str, Any]:
  """Samples responses of the policy and compares the credit of each method with the true one.

  Returns:
    The figures of each method, also written to `credit.json`, and the number of clauses.
  """
  s, collector = stage.settings, loaded.collector
  methods = make_methods(stage, loaded)
  params = models.load_models(
    loaded.models, tuple(loaded.models.frozen), Weights(s.runtime, stage.mesh)
  )
  rows = np.repeat(np.arange(len(collector.prompts)), s.evaluate.samples_per_prompt)
  rows = rows[: len(rows) // stage.mesh.size * stage.mesh.size]
  rollout = collector.collect(params, rows, stage.key('samples'), jnp.float32(0)).rollout
  text, prompts = collector.texts.get('reward'), [collector.prompts.messages(row) for row in rows]
  outputs = make_scorer(params, rollout, collector.recipe, text, prompts)

  def experience_of(method: Method) -> Experience:
    return make_experience(
      rollout.arrays,
      outputs(method.recipe),
      method.normalizer,
      jnp.float32(0),
      recipe=method.recipe,
    )[0]

  clauses = _find_clauses(stage, loaded, params['policy'], experience_of(methods[CONFIGURED]), rows)
  figures = {}
  for name, method in methods.items():
    experience = experience_of(method)
    figures[name] = clause_figures(processes.to_host(experience.reward), clauses, s.seed)
    if name == SHAPLEY_CUTS and text is None:
      reward = _shapley_rewards(params['reward'], experience, method.recipe, s.seed)
      figures[SHAPLEY] = clause_figures(reward, clauses, s.seed)
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
