"""Mistakes of the published code in its rollouts, for runs that must reproduce its results.

Off by default; `segjax.config.settings.Compat` names the switches. The mistakes come from rows
that are padded together, `micro_batch_size` at a time: prompts on the left, responses on the right.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from segjax.config.settings import Compat
from segjax.model import sharding
from segjax.train.rollout import CollectedRollout


def apply_rollout_compat(
  rollout: CollectedRollout, stop_id: int, compat: Compat, mesh: Mesh
) -> CollectedRollout:
  """Returns the rollout as the published code would have passed it on.

  `finished` still marks the responses that ended by themselves: the penalty for missing EOS reads
  it.
  """
  if compat.force_eos:
    ids = force_eos(rollout.response_ids, rollout.response_mask, stop_id)
    arrays = dataclasses.replace(rollout.arrays, response_ids=sharding.place_batch(ids, mesh))
    rollout = dataclasses.replace(rollout, arrays=arrays, response_ids=ids)
  if compat.first_row_attention_mask:
    attended = first_row_attention_mask(rollout.response_mask, compat.micro_batch_size)
    arrays = dataclasses.replace(rollout.arrays, attended=sharding.place_batch(attended, mesh))
    rollout = dataclasses.replace(rollout, arrays=arrays)
  return rollout


def force_eos(
  response_ids: Int[np.ndarray, 'B T'], response_mask: Bool[np.ndarray, 'B T'], stop_id: int
) -> Int[np.ndarray, 'B T']:
  """Replaces the last token of each response by `stop_id`, whatever was sampled there."""
  position = np.arange(response_ids.shape[1])
  last = position == response_mask.sum(axis=1, keepdims=True) - 1
  return np.where(last, stop_id, response_ids).astype(response_ids.dtype)


def first_row_attention_mask(
  response_mask: Bool[np.ndarray, 'B T'], micro_batch: int
) -> Bool[np.ndarray, 'B T']:
  """Limits attention in every row to the response of its micro-batch's FIRST row.

  Longer rows lose their tail from attention; in shorter rows padding is unmasked, which no real
  token attends to.
  """
  row = np.arange(len(response_mask))
  return response_mask[row // micro_batch * micro_batch]


def padded_length_threshold(
  threshold: int, prompt_length: Int[Array, 'B'], micro_batch: int
) -> Int[Array, 'B']:
  """Returns the length threshold of each response plus the longest prompt of its micro-batch.

  The published code subtracts the padded prompt from the index of the stop token, which already
  counts from the start of the response: n − P > threshold, here n > threshold + P.
  """
  rows = len(prompt_length)
  group = jnp.arange(rows) // micro_batch
  longest = jax.ops.segment_max(prompt_length, group, -(-rows // micro_batch))
  return threshold + longest[group]
