"""The jitted programs of reward training on labels of steps, alone or beside pairs.

`plan.programs` has those on pairs alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Int
from numpy import ndarray

from segjax.config.settings import Settings
from segjax.data.batches import StepBatch
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays
from segjax.plan.phases import TOTAL_STEPS, Calls, JobPrograms, Phase
from segjax.plan.update_calls import update_calls
from segjax.train import throughput
from segjax.train.mixed_step import MixedBatch, MixedPacking, mixed_step
from segjax.train.step_label_step import label_sums, step_label_step

_ROWS = 'labelled rows'


def _batch(s: Settings, count: int, mesh: Mesh) -> StepBatch:
  shape = count, s.data.max_length
  return StepBatch(
    abstract_arrays.batch(mesh, jnp.int32, *shape), abstract_arrays.batch(mesh, jnp.float32, *shape)
  )


def labels_alone(
  s: Settings, network: LlamaConfig, state: Any, base: Any, tokens: Int[ndarray, 'N'], mesh: Mesh
) -> JobPrograms:
  """Returns the update on labelled responses and the evaluation of held-out ones.

  Args:
    s: the settings.
    network: that is trained.
    state: its state.
    base: its frozen parameters; {} for none.
    tokens: of each labelled response of an update.
    mesh: the devices.
  """
  rows = _batch(s, len(tokens), mesh)
  trees = {'reward model state': state} | ({'base': base} if base else {}) | {_ROWS: rows}
  largest, calls = update_calls(
    lambda packing: (state, rows, packing, base),
    *(s.reward, tokens[None], s.data.max_length, mesh, network),
    group=1,
  )
  live = tuple(trees)
  update = Phase(
    'reward model update',
    step_label_step,
    largest,
    {'config': network, 'settings': s.reward, 'total_steps': TOTAL_STEPS},
    live=live,
    passed_in=live,
    calls=lambda: calls,
    model_flops=throughput.update(tokens, network, 'scalar')[throughput.FLOPS],
  )
  parameters = 'reward model parameters'
  trees[parameters] = state.params
  evaluation = Phase(
    'held-out steps',
    label_sums,
    (base | state.params, rows, jax.ShapeDtypeStruct((), jnp.int32)),
    {'config': network},
    live=live,
    passed_in=(parameters, *live[1:]),
    calls=None,
  )
  return JobPrograms(trees, [update, evaluation], {'reward': network}, int(tokens.sum()))


def with_labels(
  programs: JobPrograms, s: Settings, network: LlamaConfig, tokens: Int[ndarray, 'N'], mesh: Mesh
) -> JobPrograms:
  """Returns the programs on pairs with an update on labelled responses besides.

  Held-out labelled responses are not among them: they take less than held-out pairs, as many rows
  of one response each.

  Args:
    programs: on pairs alone.
    s: the settings.
    network: that is trained.
    tokens: of each labelled response of an update.
    mesh: the devices.
  """
  update, *others = programs.phases
  state, frozen, pairs, packing = update.arguments
  rows, of_pairs = _batch(s, len(tokens), mesh), update.calls()
  (largest,), of_labels = update_calls(
    lambda packing: (packing,),
    *(s.reward, tokens[None], s.data.max_length, mesh, network),
    group=1,
  )

  def arguments(*packings: Any) -> tuple[Any, ...]:
    return state, frozen, MixedBatch(pairs, rows), MixedPacking(*packings)

  drawn = None
  if of_pairs.arguments or of_labels.arguments:
    drawn = arguments(
      (of_pairs.arguments or update.arguments)[3], (of_labels.arguments or [largest])[0]
    )
  live = (*update.live, _ROWS)
  mixed = dataclasses.replace(
    update,
    function=mixed_step,
    arguments=arguments(packing, largest),
    live=live,
    passed_in=live,
    calls=lambda: _together(of_pairs, of_labels, drawn),
    model_flops=update.model_flops + throughput.update(tokens, network, 'scalar')[throughput.FLOPS],
    gradients=2,
  )
  return dataclasses.replace(
    programs,
    trees=programs.trees | {_ROWS: rows},
    phases=[mixed, *others],
    tokens=programs.tokens + int(tokens.sum()),
  )


def _together(of_pairs: Calls, of_labels: Calls, arguments: tuple[Any, ...] | None) -> Calls:
  """Returns the calls of a program with a loop over pieces of each part.

  All loops whose trips only the program knows are counted by one number: their mean, as pieces have
  the same number of tokens.
  """
  return Calls(
    of_pairs.number,
    trips=round((of_pairs.trips + of_labels.trips) / 2),
    arguments=arguments,
    attended=(of_pairs.attended + of_labels.attended) / 2,
  )
