"""Rollouts of the small network: order of rows, damaged weights, host arrays."""

import dataclasses

import numpy as np
import pytest
from fixtures import models, training

from segjax.config.settings import RolloutSettings
from segjax.train.rollout import make_sampling


def test_samples_of_a_prompt_are_next_to_each_other():
  params = training.network('policy', models.mesh(1))
  prompts = models.ids(seed=31, shape=(models.BATCH, training.PROMPT))
  rollout = training.sample(params).arrays
  np.testing.assert_array_equal(rollout.prompt_ids, prompts)
  np.testing.assert_array_equal(rollout.prompt_length, training.LENGTHS)
  twice = training.sample(params, samples_per_prompt=2).arrays
  np.testing.assert_array_equal(twice.prompt_ids, np.repeat(prompts, 2, axis=0))
  # The first sample of each prompt is the same as without a second one.
  for name in ('response_ids', 'response_mask', 'finished'):
    np.testing.assert_array_equal(getattr(twice, name)[::2], getattr(rollout, name))
  assert (twice.response_ids[::2] != twice.response_ids[1::2]).any(axis=1).all()


def test_a_corrupted_policy_raises():
  params = training.network('policy', models.mesh(1))
  params['backbone']['norm']['scale'] = params['backbone']['norm']['scale'].at[0].set(np.nan)
  with pytest.raises(ValueError, match='the weights of the policy are corrupted'):
    training.sample(params)


def test_a_row_that_is_not_finite_is_logged_and_the_others_continue():
  """Token 5 has a corrupted embedding: prompts with it end at once, the others do not change."""
  params = training.network('policy', models.mesh(1))
  clean = training.sample(params)
  corrupted = training.network('policy', models.mesh(1))
  corrupted['backbone']['embedding'] = corrupted['backbone']['embedding'].at[5].set(np.nan)
  lines = []
  rollout = training.sample(corrupted, log=lines.append)
  has_five = (clean.response_ids == 5) & clean.response_mask
  ids, length = training.PROMPTS
  is_corrupted = ((ids == 5) & (np.arange(ids.shape[1]) < length[:, None])).any(axis=1)
  is_clean = ~is_corrupted & ~has_five[:, :-1].any(axis=1)
  assert is_corrupted.any() and is_clean.any()
  np.testing.assert_array_equal(rollout.response_ids[is_clean], clean.response_ids[is_clean])
  assert not rollout.response_mask[is_corrupted].any()
  for row in np.flatnonzero(is_corrupted):
    assert f'prompt {row}: the logits after 0 tokens of a response are not finite' in lines


def test_sampling_reads_the_settings():
  settings = RolloutSettings(
    temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2, max_new_tokens=7, max_concurrent=4
  )
  read = dataclasses.asdict(make_sampling(settings))
  assert read == {key: value for key, value in dataclasses.asdict(settings).items() if key in read}
  assert len(read) == 5


@pytest.mark.campaign
def test_concurrency_does_not_change_responses():
  params = training.network('policy', models.mesh(1))
  odd = training.sample(params, settings=dataclasses.replace(training.ROLLOUT, max_concurrent=3))
  np.testing.assert_array_equal(odd.response_ids, training.sample(params).response_ids)


def test_host_arrays_equal_device_arrays():
  rollout = training.sample(training.network('policy', models.mesh(1)))
  for name in ('response_ids', 'response_mask', 'finished'):
    host = getattr(rollout, name)
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, getattr(rollout.arrays, name))
  length = training.LENGTHS + np.asarray(rollout.arrays.response_mask).sum(axis=1)
  np.testing.assert_array_equal(rollout.length, length)
