"""Segments by every kind of boundary and granularity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import training

from segjax.config.settings import Segmentation
from segjax.train import reward_scoring
from segjax.train.segmenter import Segmenter, segment_batch, sequence_scores
from segjax.types import Sequences

IDS = np.array([[5, 9, 6, 5, 9, 9, 6, 2], [9, 5, 6, 2, 0, 0, 0, 0]], np.int32)  # 9 '.', 2 stop
MASK = np.array([[1] * 8, [1] * 4 + [0] * 4], bool)
ENTROPY = np.array([[9, 0, 3, 0, 3, 0, 0, 9], [0, 3, 3, 9, 9, 9, 9, 9]], np.float32)


def segment_rows(delimiter_ids=(), **values):
  segmenter = Segmenter(Segmentation(**values), delimiter_ids)
  arrays = map(jnp.asarray, (IDS, MASK, np.array([True, True]), ENTROPY))
  return jax.jit(segment_batch, static_argnums=4)(*arrays, segmenter)


@pytest.mark.parametrize(
  'values, expected',
  [
    ({}, [[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 2, -1]]),
    ({'entropy_threshold': 3.0}, [[0] * 7 + [-1], [0, 0, 0, -1]]),
    ({'min_segment_length': 3}, [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, -1]]),
    ({'include_eos': True}, [[0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 2, 2]]),
    ({'granularity': 'token'}, [[0, 1, 2, 3, 4, 5, 6, -1], [0, 1, 2, -1]]),
    ({'granularity': 'bandit'}, [[0] * 8, [0] * 4]),
    ({'boundary': 'fixed_length', 'segment_length': 3}, [[0, 0, 0, 1, 1, 1, 2, -1], [0, 0, 0, -1]]),
    ({'boundary': 'delimiter'}, [[0, 0, 1, 1, 1, 1, 2, -1], [0, 1, 1, -1]]),
    ({'boundary': 'function'}, [[0, 0, 1, 1, 1, 2, 3, -1], [0, 1, 1, -1]]),
    ({'boundary': 'score_jump', 'jump_threshold': 3.0}, [[0, 1, 1, 1, 1, 1, 1, -1], [0, 0, 0, -1]]),
  ],
  ids=lambda x: '-'.join(map(str, x.values())) if isinstance(x, dict) else '',
)
def test_segments(values, expected):
  segments = segment_rows(delimiter_ids=(4, 9), **values)
  rows = [row.tolist() for row in np.asarray(segments.segment_id)]
  assert rows == [expected[0], expected[1] + [-1] * 4]


def test_some_boundaries_need_the_reference():
  for boundary in ('entropy', 'low_probability', 'shuffled_entropy', 'random'):
    assert Segmenter(Segmentation(boundary=boundary)).needs_reference
    assert not Segmenter(Segmentation('token', boundary)).needs_reference
  for boundary in ('delimiter', 'function', 'fixed_length', 'score_jump'):
    assert not Segmenter(Segmentation(boundary=boundary)).needs_reference


@pytest.mark.parametrize('boundary, expected', [('entropy', 2.0), ('low_probability', -1.0)])
def test_the_reference_is_read_for_what_boundaries_need(monkeypatch, boundary, expected):
  read = lambda *_: (jnp.full((2, 8), -1.0), jnp.full((2, 8), 2.0))  # noqa: E731
  monkeypatch.setattr(reward_scoring, 'run_packed', read)
  sequences = Sequences(jnp.asarray(IDS), jnp.asarray(MASK), jnp.array([True, True]))
  segmenter = Segmenter(Segmentation(boundary=boundary))
  scorer = dataclasses.replace(training.SCORER, segmenter=segmenter)
  assert (reward_scoring.reference_signal({}, sequences, scorer) == expected).all()


@pytest.mark.parametrize(
  'name, expected', [('mean', [10 / 3, 1]), ('max', [6, 2]), ('sum', [10, 3])]
)
def test_sequence_scores_aggregate_segment_scores(name, expected):
  score = np.where(MASK, np.arange(8), np.nan).astype(np.float32)
  segmentation = Segmentation(aggregation=name)
  scores = jax.jit(sequence_scores, static_argnums=2)(
    jnp.asarray(score), segment_rows(), segmentation
  )
  # Segments end at 1, 3 and 6, and at 0, 1 and 2: scores 1, 3, 6 and 0, 1, 2.
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
