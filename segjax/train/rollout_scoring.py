"""Which rows of a rollout are scored together.

In bfloat16 a sum in another order rounds differently: the same weights give the log-prob of a token
0.03 nats from that of a row laid out otherwise (SmolLM2-135M on an H100). Where the update packs
its rows, they are scored in the same packed rows, and its first ratios are 1.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from segjax import processes
from segjax.config.settings import RewardShaping
from segjax.model import host_memory, sharding
from segjax.model.attribution import ATTRIBUTIONS
from segjax.model.heads import token_logprobs
from segjax.model.llama import RowLayout
from segjax.train.recipe import PPORecipe
from segjax.train.rollout_rows import (
  attention_segment_ids,
  concat_prompt_response,
  concatenate,
  gather_response,
  take_rows,
)
from segjax.train.scoring import ModelOutputs, run_networks, score_chunk
from segjax.types import PackingPlan, PackingSlots, Rollout

_SMALLEST_STEP = 128  # tokens, between the widths of chunks

# Rows of a rollout that are updated on together, and how they are packed.
Minibatches = Sequence[tuple[np.ndarray, PackingPlan]]


def score(
  params: dict[str, Any],
  rollout: Rollout,
  length: Int[np.ndarray, 'B'],
  *,
  recipe: PPORecipe,
  minibatches: Minibatches | None = None,
) -> ModelOutputs:
  """Runs `score_chunk` over the rollout, in the rows of the update or in those of similar length.

  Args:
    params: parameters by name; those in host memory are on the devices during the call only.
    rollout: the responses.
    length: tokens of prompt and response together.
    recipe: the networks.
    minibatches: how the first epoch packs the rollout; it is scored in the same pieces. None scores
      `ppo.scoring_batch_size` sequences at a time, a row for each, as does
      `reward_shaping.redistribute`, which reads single responses.
  """
  params = recipe.own_params(params)
  names = {'reference', *run_networks(recipe)} & params.keys()
  params = host_memory.to_device({name: params[name] for name in names})  # once for all chunks
  if minibatches is not None and is_packed(recipe.shaping):
    return _score_packed(params, rollout, minibatches, recipe)
  order, chunks = [], []
  for rows, chunk in _chunks(rollout, length, recipe):
    order.append(rows)
    chunks.append(score_chunk(params, *chunk, recipe=recipe))
  if len(chunks) == 1:
    return chunks[0]
  # The inverse of a permutation is its argsort: rows return to their original order.
  return take_rows(concatenate(chunks), np.argsort(np.concatenate(order)))


def is_packed(shaping: RewardShaping) -> bool:
  """Returns whether packed minibatches are scored as they are packed."""
  return shaping.redistribute not in ATTRIBUTIONS


def _score_packed(
  params: dict[str, Any], rollout: Rollout, minibatches: Minibatches, recipe: PPORecipe
) -> ModelOutputs:
  outputs = None
  for rows, plan in minibatches:
    for j in range(plan.num_pieces):
      slots = jax.tree.map(lambda x, j=j: x[j], plan.pieces)
      # An empty slot reads row 0, and is written past the end, where it is dropped.
      source = np.where(slots.sequence < 0, 0, rows[slots.sequence])
      target = np.where(slots.sequence < 0, len(rollout.prompt_length), source)
      if outputs is None:
        outputs = _empty_outputs(params, rollout, slots, source, recipe=recipe)
      outputs = score_piece(outputs, params, rollout, slots, source, target, recipe=recipe)
  return outputs


# The outputs are written in place: how many pieces a rollout has would else be part of a program.
@functools.partial(jax.jit, static_argnames='recipe', donate_argnames='outputs')
def score_piece(
  outputs: ModelOutputs,
  params: dict[str, Any],
  rollout: Rollout,
  slots: PackingSlots,
  source: Int[ArrayLike, 'M'],
  target: Int[ArrayLike, 'M'],
  *,
  recipe: PPORecipe,
) -> ModelOutputs:
  """Scores one packed piece of a minibatch and writes the result into the rollout's outputs.

  Args:
    outputs: of the rollout; donated.
    params: see `score_chunk`.
    rollout: all responses.
    slots: of the piece's sequences.
    source: the row of the rollout in each slot.
    target: the same, or the number of rows where the slot is empty.
    recipe: the networks.
  """
  piece = _score_rows(params, rollout, slots, source, recipe)
  return jax.tree.map(
    lambda rows, new: sharding.constrain_batch(rows.at[target].set(new, mode='drop')),
    outputs,
    piece,
  )


@functools.partial(jax.jit, static_argnames='recipe')
def _empty_outputs(params, rollout, slots, source, *, recipe):
  piece = jax.eval_shape(lambda *x: _score_rows(*x, recipe), params, rollout, slots, source)
  size = len(rollout.prompt_length)
  return jax.tree.map(
    lambda x: sharding.constrain_batch(jnp.zeros((size, *x.shape[1:]), x.dtype)), piece
  )


def _score_rows(params, rollout, slots, source, recipe):
  rows = take_rows(rollout, source)
  return score_chunk(params, concat_prompt_response(rows), None, rows, slots, recipe=recipe)


def policy_logprobs(
  params: Any, rollout: Rollout, length: Int[np.ndarray, 'B'], *, recipe: PPORecipe
) -> Float[np.ndarray, 'B T']:
  """Returns log-probs of responses by full forward passes of the policy, on the host.

  Args:
    params: parameters of the policy.
    rollout: the responses.
    length: tokens of prompt and response together; 0 in rows whose log-probs are not needed.
    recipe: see `score`.
  """
  logprob = np.zeros(rollout.response_mask.shape, np.float32)
  for rows, chunk in _chunks(rollout, length, recipe):
    logprob[rows] = processes.to_host(_policy_chunk(params, *chunk, recipe=recipe))
  return logprob


@functools.partial(jax.jit, static_argnames='recipe')
def _policy_chunk(
  params: Any,
  ids: Int[Array, 'B S'],
  segment_ids: Int[Array, 'B S'] | None,
  rollout: Rollout,
  *,
  recipe: PPORecipe,
) -> Float[Array, 'B T']:
  logprob, _ = token_logprobs(params, ids, recipe.policy, RowLayout(segment_ids=segment_ids))
  return gather_response(logprob, rollout.prompt_length, rollout.response_ids.shape[1])


def _chunks(
  rollout: Rollout, length: Int[np.ndarray, 'B'], recipe: PPORecipe
) -> Iterator[tuple[np.ndarray, tuple[Array, Array | None, Rollout]]]:
  """Yields (rows, their token ids, segment ids and arrays) of each of `chunk_rows`."""
  ids, segment_ids = _concat_both(rollout)
  for rows, needed in chunk_rows(length, recipe.ppo.scoring_batch_size, ids.shape[1]):
    chunk_ids, chunk_segments, chunk = take_rows((ids, segment_ids, rollout), rows)
    if chunk_segments is not None:
      chunk_segments = chunk_segments[:, :needed]
    yield rows, (chunk_ids[:, :needed], chunk_segments, chunk)


def chunk_rows(
  length: Int[np.ndarray, 'B'], size: int, width: int
) -> Iterator[tuple[Int[np.ndarray, 'N'], int]]:
  """Yields (rows, their width) of the chunks in which a rollout is scored.

  A chunk is as wide as its longest row needs; chunks of rows without tokens are left out.

  Args:
    length: tokens of prompt and response together. They are known on the host: reading them from a
      device would wait for all work before.
    size: rows of a chunk; 0 for all.
    width: of the longest row that there may be.
  """
  size = size or len(length)
  order = np.arange(len(length)) if size == len(length) else np.argsort(length, kind='stable')
  for rows in order.reshape(-1, size):
    if longest := int(length[rows].max()):
      # Four widths from one power of two to the next: few programs, and little padding.
      step = max(_SMALLEST_STEP, 1 << longest.bit_length() - 3)
      yield rows, min(-(-longest // step) * step, width)


@jax.jit
def _concat_both(rollout: Rollout) -> tuple[Array, Array | None]:
  return concat_prompt_response(rollout), attention_segment_ids(rollout)
