"""The supervised fine-tuning step: next-token loss on the tokens that the mask selects."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.config.settings import SFT
from segjax.data.batches import TokenBatch
from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl.losses import batch_mean, cross_entropy, num_terms
from segjax.train import gradient_accumulation
from segjax.train.gradient_accumulation import LossAndMetrics
from segjax.train.metrics import Metrics
from segjax.train.optimizer import TrainState, apply_update
from segjax.types import PackingPlan, PackingSlots


def sft_loss(
  params: Any,
  batch: TokenBatch,
  count: Float[Array, ''],
  *,
  config: LlamaConfig,
  slots: PackingSlots | None = None,
) -> LossAndMetrics:
  """Computes -mean log π(ids_t | ids_<t) over the masked tokens, nats per token.

  Args:
    params: parameters of the network.
    batch: rows of the batch.
    count: number of masked tokens of the whole batch, of which `batch` may be a piece.
    config: the network.
    slots: slots of the conversations in packed rows; None for one row per conversation.
  """
  mask = batch.mask if slots is None else batch.mask & (slots.length > 0)[:, None]
  logprob, entropy = run_packed(token_logprobs, params, batch.ids, config, slots)
  loss = cross_entropy(logprob, mask, count=count)
  return loss, Metrics({'loss': loss, 'entropy': batch_mean(entropy, mask, 'token', count=count)})


@functools.partial(jax.jit, static_argnames='config')
def sft_sums(
  params: Any, batch: TokenBatch, num_real: Int[Array, ''], *, config: LlamaConfig
) -> dict[str, Float[Array, '']]:
  """Returns sums over the masked tokens of the first `num_real` rows, and their number, `tokens`.

  `loss` is the sum of -log π(ids_t | ids_<t), `entropy` that of the entropies, both in nats.
  """
  mask = batch.mask & (jnp.arange(len(batch.mask)) < num_real)[:, None]
  logprob, entropy = token_logprobs(params, batch.ids, config)
  sums = {'loss': -logprob, 'entropy': entropy, 'tokens': jnp.ones_like(logprob)}
  return {name: jnp.sum(value, where=mask) for name, value in sums.items()}


@functools.partial(
  jax.jit, static_argnames=('config', 'settings', 'total_steps'), donate_argnames='state'
)
def sft_step(
  state: TrainState,
  batch: TokenBatch,
  packing: PackingPlan | None = None,
  base: Any = None,
  *,
  config: LlamaConfig,
  settings: SFT,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """Updates the network on a batch of conversations, packed where `packing` is not None.

  `base` has the frozen parameters of the network, where adapters are trained.
  """
  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    functools.partial(sft_loss, config=config),
    state.params,
    batch,
    gradient_accumulation.rows_at_once(settings, *batch.ids.shape),
    packing,
    num_terms(batch.mask, 'token'),
    base=base,
  )
  state, update = apply_update(state, grads, loss, settings.optimizer, total_steps)
  return state, metrics.merge(update).flat()
