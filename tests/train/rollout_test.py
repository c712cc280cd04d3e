import dataclasses

import numpy as np
import pytest
from fixtures import models, training

from segjax.config.settings import RolloutSettings
from segjax.train.rollout import sampling


def test_rows_are_prompts_with_their_samples_next_to_each_other():
  params = training.network('policy', models.mesh(1))
  prompts = models.ids(seed=31, shape=(models.BATCH, training.PROMPT))
  found = training.sample(params)
  np.testing.assert_array_equal(found.prompt_ids, prompts)
  np.testing.assert_array_equal(found.prompt_length, training.LENGTHS)
  twice = training.sample(params, samples=2)
  np.testing.assert_array_equal(twice.prompt_ids, np.repeat(prompts, 2, axis=0))
  # The first sample of each prompt is the one that it had alone; the second is another.
  for name in ('response_ids', 'response_mask', 'finished'):
    np.testing.assert_array_equal(getattr(twice, name)[::2], getattr(found, name))
  assert (twice.response_ids[::2] != twice.response_ids[1::2]).any(axis=1).all()


def test_a_spoilt_policy_is_an_error():
  params = training.network('policy', models.mesh(1))
  params['backbone']['norm']['scale'] = params['backbone']['norm']['scale'].at[0].set(np.nan)
  with pytest.raises(ValueError, match='the weights of the policy are spoilt'):
    training.sample(params)


def test_a_broken_row_is_named_and_the_others_go_on():
  """Token 5 has a spoilt embedding: prompts with it end at once, the others are as they were."""
  params = training.network('policy', models.mesh(1))
  whole = training.sample(params)
  spoilt = training.network('policy', models.mesh(1))
  spoilt['backbone']['embedding'] = spoilt['backbone']['embedding'].at[5].set(np.nan)
  heard = []
  found = training.sample(spoilt, say=heard.append)
  prompts = models.ids(seed=31, shape=(models.BATCH, training.PROMPT))
  said_five = (np.asarray(whole.response_ids) == 5) & np.asarray(whole.response_mask)
  is_spoilt = (prompts == 5).any(axis=1)  # padding included, which is the row's own
  is_clean = ~is_spoilt & ~said_five[:, :-1].any(axis=1)
  assert is_spoilt.any() and is_clean.any()
  np.testing.assert_array_equal(found.response_ids[is_clean], whole.response_ids[is_clean])
  assert not np.asarray(found.response_mask)[is_spoilt].any()
  for row in np.flatnonzero(is_spoilt):
    assert f'prompt {row}: the logits after 0 tokens of a response are not finite' in heard


def test_sampling_reads_the_settings():
  settings = RolloutSettings(
    temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2, max_new_tokens=7, max_concurrent=4
  )
  read = dataclasses.asdict(sampling(settings))
  assert read == {key: value for key, value in dataclasses.asdict(settings).items() if key in read}
  assert len(read) == 5


def test_any_number_of_slots_will_do():
  params = training.network('policy', models.mesh(1))
  odd = training.sample(params, settings=dataclasses.replace(training.ROLLOUT, max_concurrent=3))
  np.testing.assert_array_equal(odd.response_ids, training.sample(params).response_ids)
