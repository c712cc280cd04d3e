import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jaxtyping import TypeCheckError

from segjax.rl.segmentation import (
  GRANULARITIES,
  content_mask,
  end_index,
  segment,
  segment_length,
)

from .ragged import LENGTH, from_previous, make_batch, padded


@functools.partial(jax.jit, static_argnames='granularity')
def cut(entropy, mask, finished, threshold, granularity='segment'):
  def one(entropy, mask, finished, threshold):
    return segment(entropy, mask, finished, granularity=granularity, entropy_threshold=threshold)

  return jax.vmap(one)(entropy, mask, finished, threshold)


def ends_of(segments, row):
  return np.flatnonzero(segments.end[row]).tolist()


_R1 = [0.3, 3.1, 0.4, 2.4, 0.2, 1.9, 2.2, 0.1, 0.6, 2.8]
_R7 = [0.1] * 6
_P1 = [2.4, 0.2, 1.9, 2.2, 0.1, 0.6, 2.8, 9, 9]

# (entropies of the next token, response mask, threshold or None for bandit, ends)
WORKED = {
  'R1': (_R1, '0001111111', 2.0, [3, 6, 8]),
  'R2': (_R1, '0001111111', 1.75, [3, 5, 6, 8]),
  'R3': (_R1, '0001111111', 0, [3, 4, 5, 6, 7, 8]),
  'R4': (_R1, '0001111111', None, [9]),
  'R5': (_R1, '0001111111', 2.8, [8]),  # 2.8 > 2.8 is false; the prompt's 3.1 is ignored
  'R6': ([5] * 4 + [0.1] * 4, '00001111', 2.0, [6]),
  'R7': ([*_R7, 2.5, 2.5], '00001111', 2.0, [6]),
  'R8': ([*_R7, 0.1, 2.5], '00001111', 2.0, [6]),
  'R9': ([0.1, 0.1, 0.1, 0.1, 2.5, 0.1, 0.1, 2.5], '00001111', 2.0, [4, 6]),
  'R10': ([0.1, 0.1, 0.1, 2.5], '0001', 2.0, []),  # a stop token alone
  'R11': ([0.1, 0.1, 0.1, 2.5], '0000', 2.0, []),  # nothing at all
  'R12': ([1.0, 0.0, 0.7, 0.0, 0.9, 0.3], '001111', 0, [2, 4]),  # 0 > 0 is false
  'R13': ([0.5, 2.0, 2.001, 1, 1], '01111', 2.0, [2, 3]),  # strict
  'P1': (_P1, '111111100', 2.0, [0, 3, 5]),
  'P2': (_P1, '111111100', 1.75, [0, 2, 3, 5]),
  'P3': (_P1, '111111100', 0, [0, 1, 2, 3, 4, 5]),
  'P4': (_P1, '111111100', None, [6]),
  'P5': ([0.1, 0.1, 0.1, 0.1, 3.0], '11110', 2.0, [2]),
  'P6': ([0.1, 0.1, 2.5, 2.5, 3.0], '11110', 2.0, [2]),
  'P7': ([0.1, 0.1, 0.1, 2.5], '1111', 2.0, [2]),
  'P8': ([2.5, 2.5], '11', 2.0, [0]),
  'P9': ([2.5, 1, 1], '100', 2.0, []),
  'P10': ([0, 0.7, 0, 0.9, 0.3], '11111', 0, [1, 3]),
  'P11': ([1, 2.1, 0.3, 2.2, 0.1, 0.1, 2.6, 0.2], '11111111', 2.0, [1, 3, 6]),
}


@pytest.mark.parametrize('name', WORKED)
def test_worked_example(name):
  entropy_after, mask, threshold, ends = WORKED[name]
  segments = cut(
    jnp.asarray(from_previous(np.array(padded([entropy_after])))),
    padded([[int(bit) for bit in mask]], bool),
    jnp.array([True]),
    jnp.array([threshold or 0.0]),
    granularity='bandit' if threshold is None else 'segment',
  )
  assert ends_of(segments, 0) == ends
  assert segments.num_segments[0] == len(ends)


@pytest.mark.parametrize('key', ['rm', 'ppo'])
def test_golden_file(material, key):
  cases = json.loads((material / 'spec' / 'golden.json').read_text())[key]
  mask = padded([case['resp_mask' if key == 'rm' else 'action_mask'] for case in cases], bool)
  entropy = jnp.asarray(from_previous(np.array(padded([case['H'] for case in cases]))))
  finished = jnp.ones(len(cases), bool)
  threshold = jnp.array([float(case['thr']) for case in cases])
  dense = cut(entropy, mask, finished, threshold)
  bandit = cut(entropy, mask, finished, threshold, granularity='bandit')
  for row, case in enumerate(cases):
    # A response of one stop token ends at -1 or in the prompt there; here it has no segment.
    expected = case['ends'] if mask[row].sum() > 1 else []
    assert ends_of(bandit if case['thr'] == 1000 else dense, row) == expected, case


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('threshold', [0.0, 1.75, 2.0])
def test_equals_oracle(granularity, threshold):
  batch = make_batch(seed=3)
  segments = cut(
    jnp.asarray(batch.entropy),
    jnp.asarray(batch.mask),
    jnp.asarray(batch.finished),
    jnp.full(len(batch.mask), threshold),
    granularity=granularity,
  )
  length, last = jax.vmap(segment_length)(segments), jax.vmap(end_index)(segments)
  rows = batch.rows('entropy_after', 'mask', 'finished')
  for row, (entropy_after, mask, finished) in enumerate(rows):
    ends = oracle.segment_ends(entropy_after, mask, finished, granularity, threshold)
    assert ends_of(segments, row) == ends
    assert segments.num_segments[row] == len(ends)
    starts, ids, lengths = [], [-1] * LENGTH, [0] * LENGTH
    for index, (first, end) in enumerate(oracle.spans(ends, oracle.run_of(mask)[0])):
      starts.append(first)
      for t in range(first, end + 1):
        ids[t], lengths[t] = index, end - first + 1
        assert last[row, t] == end
    assert np.flatnonzero(segments.start[row]).tolist() == starts
    assert segments.segment_id[row].tolist() == ids
    assert length[row].tolist() == lengths


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_what_cannot_matter_does_not(granularity):
  """Entropies outside the response and at its first token, even NaN, change nothing."""
  batch = make_batch(seed=4)
  first = batch.mask & ~np.pad(batch.mask, ((0, 0), (1, 0)))[:, :-1]
  spoiled = np.where(batch.mask & ~first, batch.entropy, np.nan)
  rest = (jnp.asarray(batch.mask), jnp.asarray(batch.finished), jnp.full(len(spoiled), 2.0))
  clean = cut(jnp.asarray(batch.entropy), *rest, granularity=granularity)
  again = cut(jnp.asarray(spoiled), *rest, granularity=granularity)
  for before, after in zip(jax.tree.leaves(clean), jax.tree.leaves(again), strict=True):
    assert jnp.array_equal(before, after)


def test_token_never_merges():
  entropy, mask = jnp.zeros(4), jnp.ones(4, bool)
  segments = segment(entropy, mask, jnp.array(True), granularity='token', entropy_threshold=9.0)
  assert segments.segment_id.tolist() == [0, 1, 2, -1]
  merged = segment(entropy, mask, jnp.array(True), entropy_threshold=0.0)
  assert merged.segment_id.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize(
  ('granularity', 'finished', 'expected'),
  [
    ('segment', True, [0, 1, 1, 0]),
    ('segment', False, [0, 1, 1, 1]),
    ('token', True, [0, 1, 1, 0]),
    ('token', False, [0, 1, 1, 1]),
    ('bandit', True, [0, 1, 1, 1]),
    ('bandit', False, [0, 1, 1, 1]),
  ],
)
def test_content(granularity, finished, expected):
  mask = jnp.array([False, True, True, True])
  content = content_mask(mask, jnp.array(finished), granularity)
  assert content.tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('mask', ['0000', '0100', '1000', '0001'])
def test_stop_token_alone_or_nothing_has_no_segment(granularity, mask):
  mask = jnp.array([bit == '1' for bit in mask])
  segments = segment(jnp.full(4, 9.0), mask, jnp.array(True), granularity=granularity)
  assert segments.num_segments == 0
  assert not segments.start.any() and not segments.end.any()
  assert segments.segment_id.tolist() == [-1] * 4
  assert segment_length(segments).tolist() == [0] * 4


def test_unknown_granularity_lists_the_valid_ones():
  mask, finished = jnp.ones(3, bool), jnp.array(True)
  with pytest.raises(ValueError, match=r"'word'.*segment.*token.*bandit"):
    segment(jnp.zeros(3), mask, finished, granularity='word')
  with pytest.raises(ValueError, match=r"'word'.*segment.*token.*bandit"):
    content_mask(mask, finished, 'word')


@pytest.mark.parametrize(
  ('entropy', 'mask', 'finished'),
  [
    (jnp.zeros(3, int), jnp.ones(3, bool), jnp.array(True)),
    (jnp.zeros(3), jnp.ones(3), jnp.array(True)),
    (jnp.zeros(3), jnp.ones(4, bool), jnp.array(True)),
    (jnp.zeros((2, 3)), jnp.ones((2, 3), bool), jnp.ones(2, bool)),
  ],
  ids=['integer', 'mask of floats', 'shorter', 'no vmap'],
)
def test_wrong_arrays_raise(entropy, mask, finished):
  with pytest.raises(TypeCheckError):
    segment(entropy, mask, finished)
