"""The training step of a reward model on labels of steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.config.settings import PairTraining
from segjax.data.batches import StepBatch
from segjax.model.heads import scores
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl.losses import batch_mean, num_terms, step_label_loss
from segjax.train import gradient_accumulation
from segjax.train.gradient_accumulation import LossAndMetrics
from segjax.train.metrics import Metrics
from segjax.train.optimizer import TrainState, apply_update
from segjax.types import PackingPlan, PackingSlots


def label_loss(
  params: Any,
  batch: StepBatch,
  count: Float[Array, ''],
  *,
  config: LlamaConfig,
  slots: PackingSlots | None = None,
) -> LossAndMetrics:
  """Computes `losses.step_label_loss` of the score at the end of each labelled step.

  `accuracy` is the share of the steps whose score has the sign of its label, above or below 1/2.

  Args:
    params: parameters of the reward model.
    batch: rows of the batch.
    count: number of labelled steps of the whole batch, of which `batch` may be a piece.
    config: the network.
    slots: slots of the rows in packed rows; None for one per row.
  """
  mask = ~jnp.isnan(batch.label)
  if slots is not None:
    mask &= (slots.length > 0)[:, None]
  score = run_packed(scores, params, batch.ids, config, slots)
  loss = step_label_loss(score, batch.label, mask, count=count)
  is_right = ((score > 0) == (batch.label > 0.5)).astype(jnp.float32)
  accuracy = batch_mean(is_right, mask, 'token', count=count)
  return loss, Metrics({'loss': loss, 'accuracy': accuracy})


@functools.partial(jax.jit, static_argnames='config')
def label_sums(
  params: Any, batch: StepBatch, num_real: Int[Array, ''], *, config: LlamaConfig
) -> dict[str, Float[Array, '']]:
  """Returns sums of loss and accuracy over the steps of the first `num_real` rows, and `steps`."""
  is_real = (jnp.arange(len(batch.label)) < num_real)[:, None]
  batch = StepBatch(batch.ids, jnp.where(is_real, batch.label, jnp.nan))
  _, metrics = label_loss(params, batch, jnp.ones(()), config=config)
  return metrics.flat() | {'steps': num_terms(~jnp.isnan(batch.label), 'token')}


def label_gradient(
  params: Any,
  batch: StepBatch,
  packing: PackingPlan | None,
  base: Any,
  *,
  config: LlamaConfig,
  settings: PairTraining,
) -> tuple[LossAndMetrics, Any]:
  """Returns ((loss, metrics), gradient) of a batch by `params`; arguments as of `sft_step`."""
  return gradient_accumulation.value_and_grad(
    functools.partial(label_loss, config=config),
    params,
    batch,
    gradient_accumulation.rows_at_once(settings, *batch.ids.shape),
    packing,
    num_terms(~jnp.isnan(batch.label), 'token'),
    base=base,
  )


@functools.partial(
  jax.jit, static_argnames=('config', 'settings', 'total_steps'), donate_argnames='state'
)
def step_label_step(
  state: TrainState,
  batch: StepBatch,
  packing: PackingPlan | None = None,
  base: Any = None,
  *,
  config: LlamaConfig,
  settings: PairTraining,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """Updates a reward model on a batch of labelled responses; arguments as of `sft_step`."""
  (loss, metrics), grads = label_gradient(
    state.params, batch, packing, base, config=config, settings=settings
  )
  state, update = apply_update(state, grads, loss, settings.optimizer, total_steps)
  return state, metrics.merge(update).flat()
