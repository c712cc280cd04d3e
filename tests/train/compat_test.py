"""Reproduced mistakes of the published code, on worked examples."""

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models

from segjax.config.settings import Compat
from segjax.train.compat import (
  apply_rollout_compat,
  first_row_attention_mask,
  force_eos,
  padded_length_threshold,
)
from segjax.train.rollout import CollectedRollout
from segjax.types import Rollout

STOP, PAD = 128009, 128009
# Three rows padded together to a prompt of six: the first ends by itself, the second does not,
# the third ends after one token.
RESPONSES = [[21, 22, STOP, PAD, PAD], [31, 32, 33, 34, 35], [41, STOP, PAD, PAD, PAD]]
LENGTHS = np.array([3, 5, 2])
PROMPT_LENGTHS = np.array([4, 6, 5])


@pytest.fixture(scope='module')
def rollout():
  ids = np.array(RESPONSES, np.int32)
  mask = np.arange(5) < LENGTHS[:, None]
  finished = np.array([True, False, True])
  arrays = Rollout(
    prompt_ids=jnp.ones((3, 6), jnp.int32),
    prompt_length=jnp.asarray(PROMPT_LENGTHS),
    response_ids=jnp.asarray(ids),
    response_mask=jnp.asarray(mask),
    finished=jnp.asarray(finished),
    old_logprob=jnp.zeros((3, 5)),
  )
  return CollectedRollout(arrays, ids, mask, finished, PROMPT_LENGTHS + LENGTHS)


def test_force_eos_overwrites_the_last_token(rollout):
  ids = force_eos(rollout.response_ids, rollout.response_mask, STOP)
  assert ids.tolist() == [RESPONSES[0], [31, 32, 33, 34, STOP], RESPONSES[2]]
  other_stop = force_eos(np.array([[5, 128001, 0]]), np.array([[True, True, False]]), STOP)
  assert other_stop.tolist() == [[5, STOP, 0]]


def test_attention_ends_where_the_first_row_does(rollout):
  # Padded columns 6 to 10 of the published masks 00111111100, 11111111100, 01111111100.
  attended = first_row_attention_mask(rollout.response_mask, micro_batch=4)
  assert attended.astype(int).tolist() == [[1, 1, 1, 0, 0]] * 3


def test_each_micro_batch_has_a_first_row_of_its_own(rollout):
  attended = first_row_attention_mask(rollout.response_mask, micro_batch=2)
  assert attended.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
  own = first_row_attention_mask(rollout.response_mask, micro_batch=1)
  assert np.array_equal(own, rollout.response_mask)


def test_length_is_compared_without_the_padded_prompt(rollout):
  # Published: e + 1 - P > 2, with e the index of the stop token in the response and P = 6.
  lengths = rollout.arrays.prompt_length
  assert padded_length_threshold(2, lengths, 4).tolist() == [8, 8, 8]
  assert padded_length_threshold(2, lengths, 2).tolist() == [8, 8, 7]  # P = 6, 6 and 5


def test_a_length_of_1024_passes_800_only_with_short_prompts():
  threshold = padded_length_threshold(800, jnp.array([223, 224]), micro_batch=1)
  assert (threshold < 1024).tolist() == [True, False]


def test_off_by_default_and_finished_stays_as_sampled(rollout):
  mesh = models.mesh(1)
  assert apply_rollout_compat(rollout, STOP, Compat(), mesh) is rollout
  compat = Compat(force_eos=True, first_row_attention_mask=True)
  changed = apply_rollout_compat(rollout, STOP, compat, mesh)
  assert changed.arrays.finished.tolist() == [True, False, True]
  assert changed.arrays.response_ids[1, 4] == changed.response_ids[1, 4] == STOP
  assert changed.arrays.attended.astype(int).tolist() == [[1, 1, 1, 0, 0]] * 3
