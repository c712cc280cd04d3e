"""The supervised fine-tuning step: next-token loss on the tokens that the mask selects."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.rl.losses import cross_entropy
from segjax.rl.masked import masked_mean
from segjax.settings import Optimizer
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState


def sft_loss(
  params: Any, ids: Int[Array, 'B S'], mask: Bool[Array, 'B S'], config: LlamaConfig
) -> tuple[Float[Array, ''], dict[str, Array]]:
  """-mean log π(ids_t | ids_<t) over the masked tokens of the batch, nats per token."""
  logprob, entropy = token_logprobs(params, ids, config)
  loss = cross_entropy(logprob, mask)
  return loss, {'loss': loss, 'entropy': masked_mean(entropy, mask)}


@functools.partial(
  jax.jit, static_argnames=('config', 'optimizer', 'total_steps'), donate_argnames='state'
)
def sft_step(
  state: TrainState,
  ids: Int[Array, 'B S'],
  mask: Bool[Array, 'B S'],
  *,
  config: LlamaConfig,
  optimizer: Optimizer,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update on a batch of conversations."""
  (loss, metrics), grads = jax.value_and_grad(sft_loss, has_aux=True)(
    state.params, ids, mask, config
  )
  state, update = apply_update(state, grads, loss, optimizer, total_steps)
  return state, metrics | update
