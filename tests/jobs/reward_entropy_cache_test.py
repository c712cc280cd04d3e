"""Reading a cache of entropies."""

import dataclasses

import numpy as np
import pytest
from fixtures import training

from segjax.config.settings import Segmentation
from segjax.data.batches import Pairs
from segjax.data.ragged import Ragged
from segjax.errors import UserError
from segjax.jobs import reward_entropy_cache
from segjax.train.segmenter import Segmenter


@pytest.mark.parametrize(
  'values',
  [
    np.zeros(4, np.float32),
    np.zeros((3, 1), np.float32),
    np.zeros(3, np.float64),
    np.array([0.0, np.nan, 1.0], np.float32),
    None,
  ],
)
def test_a_damaged_cache_is_named(tmp_path, values):
  path = tmp_path / 'cache.npy'
  if values is None:
    path.write_bytes(b'\x93NUMPY')
  else:
    np.save(path, values)
  with pytest.raises(UserError, match=r'cache.npy .*; remove it'):
    reward_entropy_cache._read(path, 3)


def test_log_probs_are_not_taken_for_entropies(tmp_path):
  rows = Ragged.from_rows([[1, 2], [3]], np.int32)
  names = 'chosen_finished', 'rejected_finished', 'prompt_length', 'rating_gap', 'row', 'group'
  unused = dict.fromkeys(names, np.zeros(2))
  pairs = Pairs(chosen=rows, rejected=rows, length=4, pad_id=0, counts={}, **unused)
  scorers = [
    dataclasses.replace(training.SCORER, segmenter=Segmenter(Segmentation(boundary=boundary)))
    for boundary in ('entropy', 'low_probability', 'random')
  ]
  name, other, same = (reward_entropy_cache._name(pairs, tmp_path, scorer) for scorer in scorers)
  assert name == same != other


def test_a_sound_cache(tmp_path):
  np.save(tmp_path / 'cache.npy', np.arange(3, dtype=np.float32))
  assert list(reward_entropy_cache._read(tmp_path / 'cache.npy', 3)) == [0, 1, 2]
