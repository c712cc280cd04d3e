"""The program that scores a rollout: packed pieces of its updates, or rows of one text each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.plan import abstract_arrays
from segjax.plan.lengths import TextLengths
from segjax.plan.phases import Calls, Phase
from segjax.plan.update_calls import update_calls
from segjax.train.recipe import PPORecipe
from segjax.train.rollout_scoring import chunk_rows, is_packed, score_piece
from segjax.train.scoring import score_chunk

LISTED = 'reward model '  # tree of one of config.rewards, and its name there

Trees = dict[str, Any]


def scoring_phase(
  s: Settings, recipe: PPORecipe, trees: Trees, texts: TextLengths, mesh: Mesh
) -> Phase:
  """Returns the phase.

  Args:
    s: the settings.
    recipe: the networks.
    trees: shapes of the parameters and of the rollout, by name.
    texts: of a rollout.
    mesh: the devices.
  """
  passed_in = {'reference': 'reference'}
  if recipe.critic is not None:
    passed_in['critic'] = 'critic parameters'
  if recipe.reward is not None:
    passed_in['reward'] = 'reward model'
  if recipe.reward_lm is not None:
    passed_in['reward_lm'] = 'reward language model'
  passed_in |= {source.key: f'{LISTED}{source.name}' for source in recipe.rewards}
  if recipe.recompute_logprob:
    passed_in['policy'] = 'policy parameters'
  params = {name: trees[tree] for name, tree in passed_in.items()}
  phase = Phase(
    'scoring',
    score_piece,
    (),
    {'recipe': recipe},
    live=('rollout', 'experience'),
    passed_in=tuple(passed_in.values()),
  )
  if scores_packed(s):
    return _in_pieces(phase, s, recipe, (params, trees['rollout']), texts, mesh)
  return _in_rows(phase, s, params, texts, mesh)


def scores_packed(s: Settings) -> bool:
  """Returns whether rollouts are scored in the packed pieces of their updates."""
  return bool(s.ppo.packing_length) and is_packed(s.reward_shaping)


def _in_pieces(
  phase: Phase,
  s: Settings,
  recipe: PPORecipe,
  inputs: tuple[Trees, Any],
  texts: TextLengths,
  mesh: Mesh,
) -> Phase:
  """Returns the phase with a call for each packed piece of the first epoch's minibatches."""
  outputs = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.model_outputs(
      s.ppo.rollout_batch_size,
      s.rollout.max_new_tokens,
      has_critic=recipe.critic is not None,
      has_lm=recipe.reward_lm is not None,
      listed=[source.name for source in recipe.rewards],
    ),
    mesh,
  )

  def arguments(plan):
    slots = jax.tree.map(
      lambda x: abstract_arrays.replicated(mesh, *x.shape[1:], dtype=x.dtype), plan.pieces
    )
    return outputs, *inputs, slots, slots.sequence, slots.sequence

  longest = s.data.max_prompt_length + s.rollout.max_new_tokens
  batches = texts.total.reshape(-1, s.ppo.minibatch_size)
  largest, updates = update_calls(arguments, s.ppo, batches, longest, mesh, recipe.policy)
  calls = dataclasses.replace(updates, number=updates.number * updates.trips, trips=1)
  return dataclasses.replace(
    phase, arguments=largest, passed_in=(*phase.passed_in, 'rollout'), calls=lambda: calls
  )


def _in_rows(phase: Phase, s: Settings, params: Trees, texts: TextLengths, mesh: Mesh) -> Phase:
  """Returns the phase with a call for each chunk of ppo.scoring_batch_size rows."""
  size = s.ppo.scoring_batch_size or s.ppo.rollout_batch_size
  prompt, response = s.data.max_prompt_length, s.rollout.max_new_tokens
  rollout = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.rollout(size, prompt, response), mesh
  )

  def arguments(width):
    return params, abstract_arrays.batch(mesh, jnp.int32, size, width), None, rollout

  longest = prompt + response
  # The work of a chunk grows with its width: of all widths the mean stands for the others.
  widths = [width for _, width in chunk_rows(texts.total, size, longest)]
  mean = min(widths, key=lambda width: abs(width - np.mean(widths)))
  return dataclasses.replace(
    phase,
    function=score_chunk,
    arguments=arguments(longest),
    calls=lambda: Calls(sum(widths) / mean, arguments=None if mean == longest else arguments(mean)),
  )
