"""What the published code does to its rollouts by mistake, for runs that must reproduce it.

Off by default; `segjax.config.settings.Compat` names the switches. The mistakes come from rows
that are padded together, `micro_batch` at a time: prompts on the left, responses on the right.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from segjax.config.settings import Compat
from segjax.types import Rollout


def apply_rollout_compat(rollout: Rollout, stop_id: int, compat: Compat) -> Rollout:
  """The rollout as the published code would have handed it on.

  `finished` still says which responses ended by themselves: the end penalty reads it.
  """
  if compat.force_eos:
    ids = force_eos(rollout.response_ids, rollout.response_mask, stop_id)
    rollout = dataclasses.replace(rollout, response_ids=ids)
  if compat.first_row_attention_mask:
    attended = first_row_attention_mask(rollout.response_mask, compat.micro_batch_size)
    rollout = dataclasses.replace(rollout, attended=attended)
  return rollout


def force_eos(
  response_ids: Int[Array, 'B T'], response_mask: Bool[Array, 'B T'], stop_id: int
) -> Int[Array, 'B T']:
  """The last token of each response becomes `stop_id`, whatever was sampled there."""
  position = jnp.arange(response_ids.shape[1])[None]
  last = position == jnp.sum(response_mask, axis=1, keepdims=True) - 1
  return jnp.where(last, stop_id, response_ids)


def first_row_attention_mask(
  response_mask: Bool[Array, 'B T'], micro_batch: int
) -> Bool[Array, 'B T']:
  """Attention up to the last response token of the micro-batch's FIRST row, in every row.

  In a longer row the tail is seen by no token and sees none; in a shorter row the padding is let
  in, which no real token looks at.
  """
  row = jnp.arange(len(response_mask))
  return response_mask[row // micro_batch * micro_batch]


def padded_length_threshold(
  threshold: int, prompt_length: Int[Array, 'B'], micro_batch: int
) -> Int[Array, 'B']:
  """The length threshold of each response plus the longest prompt of its micro-batch.

  The published code subtracts the padded prompt from the index of the stop token, which already
  counts from the start of the response: n − P > threshold, here n > threshold + P.
  """
  rows = len(prompt_length)
  group = jnp.arange(rows) // micro_batch
  longest = jax.ops.segment_max(prompt_length, group, -(-rows // micro_batch))
  return threshold + longest[group]
