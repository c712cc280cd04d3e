"""The training step of a reward model on preference pairs and labels of steps together."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from segjax.config.settings import RewardTraining
from segjax.data.batches import StepBatch
from segjax.train.metrics import Metrics
from segjax.train.optimizer import TrainState, apply_update
from segjax.train.preference_step import FrozenParams, pair_gradient
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.step_label_step import label_gradient
from segjax.types import PackingPlan, PreferenceBatch


class MixedBatch(NamedTuple):
  """Pairs, and responses with labelled steps; each has a length of its own."""

  pairs: PreferenceBatch
  steps: StepBatch


class MixedPacking(NamedTuple):
  """How the sequences of either part are packed; None for one per row."""

  pairs: PackingPlan | None = None
  steps: PackingPlan | None = None


UNPACKED = MixedPacking()


@functools.partial(
  jax.jit, static_argnames=('scorer', 'settings', 'total_steps'), donate_argnames='state'
)
def mixed_step(
  state: TrainState,
  frozen: FrozenParams,
  batch: MixedBatch,
  packing: MixedPacking = UNPACKED,
  *,
  scorer: SegmentScorer,
  settings: RewardTraining,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """Updates a reward model: loss = loss of pairs + steps_weight · loss of labelled steps.

  The first is that of `preference_step`, a mean over the pairs of the batch; the second that of
  `step_label_step`, a mean over its labelled steps. So the weight does not depend on how many there
  are of each. The two parts go through the network one after another; the gradients of both
  exist at once.

  Args:
    state: state of the reward model; donated.
    frozen: parameters that are not trained.
    batch: both parts.
    packing: of both parts.
    scorer: the network, and how it scores a response.
    settings: losses and optimizer.
    total_steps: updates in the whole run.

  Returns:
    (state, metrics): those of `preference_step`, where `loss` is that of the pairs, and `step_loss`
    and `step_accuracy`, those of `step_label_step`.
  """
  (loss, metrics), grads = pair_gradient(
    state.params, frozen, batch.pairs, packing.pairs, scorer=scorer, settings=settings
  )
  (step_loss, step_metrics), step_grads = label_gradient(
    state.params, batch.steps, packing.steps, frozen.base, config=scorer.reward, settings=settings
  )
  weight = settings.steps_weight
  grads = jax.tree.map(lambda x, y: _weighted_sum(x, y, weight), grads, step_grads)
  total = loss + weight * step_loss
  state, update = apply_update(state, grads, total, settings.optimizer, total_steps)
  named = {f'step_{name}': value for name, value in step_metrics.mean.items()}
  return state, metrics.merge(Metrics(named)).merge(update).flat()


def _weighted_sum(x: Array, y: Array, weight: float) -> Any:
  """Returns x + weight · y in the dtype of x, added in at least float32."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(wide) + weight * y.astype(wide)).astype(x.dtype)
