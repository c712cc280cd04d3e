"""Shapley values of the segments of responses: what a segment adds to the score of those kept.

Dear, and so a yardstick for the ways to redistribute a score rather than one of them: a response of
J segments takes J forward passes of the reward model for each order that is drawn.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax.model.heads import scores
from segjax.model.llama import LlamaConfig
from segjax.train.rollout_rows import concat_prompt_response
from segjax.types import Rollout

Worth = Callable[[Bool[np.ndarray, 'B J']], Float[np.ndarray, 'B']]


def shapley_values(
  worth: Worth, num_segments: Int[np.ndarray, 'B'], orders: int, seed: int
) -> Float[np.ndarray, 'B J']:
  """Returns the mean of what each segment adds to those before it, over random orders.

  φ_j = E_order[v(those before j, and j) - v(those before j)]

  The values of a response sum to v(all) - v(none), whatever the orders. See Shapley 1953 and Cao
  et al. 2025 (SCAR), https://arxiv.org/abs/2505.20417.

  Args:
    worth: v, of the segments that are kept.
    num_segments: of each response, at most J; values beyond them are 0.
    orders: that are drawn; their number, and with it the noise, is the caller's choice.
    seed: of the orders.
  """
  rng, rows = np.random.default_rng(seed), np.arange(len(num_segments))
  most = int(num_segments.max(initial=0))
  values = np.zeros((len(rows), most))
  none = worth(np.zeros(values.shape, bool))
  for _ in range(orders):
    # Segments that a response lacks come last, and add nothing.
    draw = rng.random(values.shape) + (np.arange(most) >= num_segments[:, None])
    order, kept, before = np.argsort(draw, axis=1), np.zeros(values.shape, bool), none
    for column in order.T:
      kept[rows, column] = True
      after = worth(kept)
      values[rows, column] += after - before
      before = after
  return values / orders


def segment_worth(
  params: Any, rollout: Rollout, segment_id: Int[Array, 'B T'], config: LlamaConfig
) -> Worth:
  """Returns v: the reward model's score at the end of a response without the other segments.

  Args:
    params: the reward model.
    rollout: the responses.
    segment_id: index of each token's segment; -1 for a stop token outside, which always stays.
    config: the network.
  """
  ids = concat_prompt_response(rollout)
  arguments = ids, rollout.prompt_length, rollout.response_mask, segment_id

  def worth(kept):
    return np.asarray(_score_kept(params, *arguments, jnp.asarray(kept), config=config))

  return worth


@functools.partial(jax.jit, static_argnames='config')
def _score_kept(
  params: Any,
  ids: Int[Array, 'B S'],
  prompt_length: Int[Array, 'B'],
  response_mask: Bool[Array, 'B T'],
  segment_id: Int[Array, 'B T'],
  kept: Bool[Array, 'B J'],
  *,
  config: LlamaConfig,
) -> Float[Array, 'B']:
  in_kept = jnp.take_along_axis(kept, jnp.maximum(segment_id, 0), axis=1) | (segment_id < 0)
  length, position = prompt_length[:, None], jnp.arange(ids.shape[1])[None]
  index = jnp.clip(position - length, 0, response_mask.shape[1] - 1)
  stays = jnp.take_along_axis(in_kept & response_mask, index, axis=1)
  stays = jnp.where(position < length, True, stays & (position - length < response_mask.shape[1]))
  # What stays moves together, in its order.
  order = jnp.argsort(~stays, axis=1, stable=True)
  score = scores(params, jnp.take_along_axis(ids, order, axis=1), config)
  last = jnp.sum(stays, axis=1, keepdims=True) - 1
  return jnp.take_along_axis(score, last, axis=1)[:, 0]
