"""The training step on preference pairs: Bradley-Terry loss of a reward model, or of DPO."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.settings import PairTraining
from segjax.rl.losses import bradley_terry
from segjax.train import gradient_accumulation
from segjax.train.gradient_accumulation import LossAndMetrics
from segjax.train.metrics import Metrics
from segjax.train.optimizer import TrainState, apply_update
from segjax.train.reward_scoring import PairScorer
from segjax.types import PackingPlan, PreferenceBatch


def margins(pairs: PreferenceBatch, settings: PairTraining) -> Float[Array, 'B']:
  """Returns the margin of each pair: margin + rating_margin_coef · (difference of ratings)."""
  constant = jnp.full(pairs.chosen.finished.shape, settings.margin, jnp.float32)
  if pairs.rating_gap is None or not settings.rating_margin_coef:
    return constant
  # A pair without ratings has the constant margin; its NaN would reach the loss of the batch.
  gap = jnp.where(jnp.isnan(pairs.rating_gap), 0, pairs.rating_gap)
  return constant + settings.rating_margin_coef * gap


class FrozenParams(NamedTuple):
  """Parameters that training on pairs reads.

  Attributes:
    reference: of the reference; None where it is not run.
    base: of the trained network, where adapters are trained.
  """

  reference: Any = None
  base: Any = None


def pair_gradient(
  params: Any,
  frozen: FrozenParams,
  pairs: PreferenceBatch,
  packing: PackingPlan | None,
  *,
  scorer: PairScorer,
  settings: PairTraining,
) -> tuple[LossAndMetrics, Any]:
  """Returns ((loss, metrics), gradient) of `preference_step`, by the parameters of the network."""
  count = len(pairs.chosen.finished)  # of the full batch, so that the means of pieces add up

  def objective(params, pairs, *, slots):
    score, figures = scorer.score_pairs(params, frozen.reference, pairs, slots)
    margin = score[:, 0] - score[:, 1]
    smoothing = settings.label_smoothing
    loss = bradley_terry(score[:, 0], score[:, 1], margins(pairs, settings), smoothing)
    # An empty slot holds a copy of row 0, which must not count again.
    is_pair = jnp.ones(margin.shape, bool) if slots is None else slots.sequence[::2] >= 0

    def mean(x):
      return jnp.sum(jnp.where(is_pair, x, 0)) / count

    metrics = {'loss': mean(loss), 'accuracy': mean(margin > 0), 'margin': mean(margin)}
    metrics |= {name: mean(value) for name, value in figures.items()}
    return mean(loss), Metrics(metrics)

  tokens = 2 * pairs.chosen.ids.shape[1]
  micro_batch = gradient_accumulation.rows_at_once(settings, count, tokens)
  return gradient_accumulation.value_and_grad(
    objective, params, pairs, micro_batch, packing, base=frozen.base
  )


# Donated: the state of a large model would not fit twice, before and after the update.
@functools.partial(
  jax.jit, static_argnames=('scorer', 'settings', 'total_steps'), donate_argnames='state'
)
def preference_step(
  state: TrainState,
  frozen: FrozenParams,
  pairs: PreferenceBatch,
  packing: PackingPlan | None = None,
  *,
  scorer: PairScorer,
  settings: PairTraining,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """Updates a network: loss = -mean log σ(score(chosen) - score(rejected) - margin).

  Args:
    state: state of the trained network; donated.
    frozen: parameters that are not trained.
    pairs: the batch.
    packing: how the 2B sequences, chosen and rejected in turn, are packed; None for one per row.
    scorer: networks, and how they score a response.
    settings: loss and optimizer.
    total_steps: updates in the whole run.
  """
  (loss, metrics), grads = pair_gradient(
    state.params, frozen, pairs, packing, scorer=scorer, settings=settings
  )
  state, update = apply_update(state, grads, loss, settings.optimizer, total_steps)
  return state, metrics.merge(update).flat()
