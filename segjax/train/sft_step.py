"""The supervised fine-tuning step: next-token loss on the tokens that the mask selects."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from segjax.data.batches import TokenBatch
from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.rl.losses import batch_mean, cross_entropy, num_terms
from segjax.settings import SFT
from segjax.train import accumulate
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState


def sft_loss(
  params: Any, batch: TokenBatch, count: Float[Array, ''], *, config: LlamaConfig
) -> tuple[Float[Array, ''], dict[str, Array]]:
  """-mean log π(ids_t | ids_<t) over the masked tokens, nats per token.

  Args:
    count: masked tokens of the whole batch, of which this one may be a part.
  """
  logprob, entropy = token_logprobs(params, batch.ids, config)
  loss = cross_entropy(logprob, batch.mask, count=count)
  return loss, {'loss': loss, 'entropy': batch_mean(entropy, batch.mask, 'token', count=count)}


@functools.partial(
  jax.jit, static_argnames=('config', 'settings', 'total_steps'), donate_argnames='state'
)
def sft_step(
  state: TrainState, batch: TokenBatch, *, config: LlamaConfig, settings: SFT, total_steps: int
) -> tuple[TrainState, dict[str, Array]]:
  """One update on a batch of conversations."""
  pieces = len(batch.ids) // settings.micro_batch if settings.micro_batch else 1
  (loss, metrics), grads = accumulate.value_and_grad(
    functools.partial(sft_loss, config=config),
    state.params,
    batch,
    pieces,
    num_terms(batch.mask, 'token'),
  )
  state, update = apply_update(state, grads, loss, settings.optimizer, total_steps)
  return state, metrics | update
