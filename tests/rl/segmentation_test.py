import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.platforms import PATHS, jit_by_path
from fixtures.responses import LENGTH, from_previous, padded
from fixtures.strategies import corrupted, responses
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from segjax.rl import oracle
from segjax.rl.segmentation import (
  GRANULARITIES,
  content_mask,
  segment,
)


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
def test_golden_file(shared_files, key):
  cases = json.loads((shared_files / 'spec' / 'golden.json').read_text())[key]
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


# (granularity, min_length, stop_inside), together in one compiled function
WAYS = [
  ('segment', 1, False),
  ('segment', 1, True),
  ('segment', 2, False),
  ('segment', 5, True),
  ('token', 1, False),
  ('token', 3, True),
  ('bandit', 1, False),
  ('bandit', 3, True),
]


def cut_every_way(entropy, mask, finished, threshold):
  segmented = []
  for granularity, min_length, stop_inside in WAYS:
    options = {'granularity': granularity, 'min_length': min_length, 'stop_inside': stop_inside}
    segmented.append(segment(entropy, mask, finished, entropy_threshold=threshold, **options))
  return segmented


CUT_EVERY_WAY = jit_by_path(cut_every_way)


@pytest.mark.parametrize('path', PATHS)
@given(response=responses(), threshold=st.sampled_from([0.0, 1.75, 2.0]))
def test_equals_oracle(path, response, threshold):
  entropy_after, entropy, mask, finished = response
  begin, _ = oracle.run_of(mask.tolist())
  # Entropies outside the response and of its first token cannot matter.
  entropy = corrupted(entropy, mask & (np.arange(LENGTH) != begin))
  every = jax.device_get(CUT_EVERY_WAY[path](entropy, mask, finished, threshold))
  for segments, (granularity, min_length, stop_inside) in zip(every, WAYS, strict=True):
    case = (entropy_after.tolist(), mask.tolist(), bool(finished), granularity, threshold)
    ends = oracle.segment_ends(*case, min_length, stop_inside)
    starts, ids = [], [-1] * LENGTH
    for index, (first, end) in enumerate(oracle.spans(ends, begin)):
      starts.append(first)
      ids[first : end + 1] = [index] * (end + 1 - first)
    assert np.flatnonzero(segments.end).tolist() == ends
    assert np.flatnonzero(segments.start).tolist() == starts
    assert segments.num_segments == len(ends)
    assert segments.segment_id.tolist() == ids
    content = sum(mask) - bool(finished and not stop_inside and granularity != 'bandit')
    assert np.sum(segments.segment_id >= 0) == (content if ends else 0)
    if granularity == 'segment':
      assert all(np.diff(starts) >= min_length)


def test_worked_min_length():
  # Cuts are wanted before 1, 2, 3, 6, 7. That before 1 would leave one token, so would that
  # before 3; the last segment is as short as it comes out.
  entropy = jnp.array([0, 9, 9, 9, 0, 0, 9, 9, 0.0])
  mask, finished = jnp.ones(9, bool), jnp.array(True)
  segments = segment(entropy, mask, finished, min_length=2)
  assert segments.segment_id.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, -1]
  segments = segment(entropy, mask, finished, min_length=7, stop_inside=True)
  assert segments.segment_id.tolist() == [0] * 7 + [1] * 2


def test_only_a_min_length_costs_a_scan():
  def jaxpr(**options):
    arrays = (jnp.zeros(4), jnp.ones(4, bool), jnp.array(True))
    return str(jax.make_jaxpr(functools.partial(segment, **options))(*arrays))

  assert 'scan[' in jaxpr(min_length=2)
  for options in ({}, {'stop_inside': True}, {'granularity': 'token', 'min_length': 2}):
    assert 'scan[' not in jaxpr(**options)


def test_token_never_merges():
  entropy, mask = jnp.zeros(4), jnp.ones(4, bool)
  segments = segment(entropy, mask, jnp.array(True), granularity='token', entropy_threshold=9.0)
  assert segments.segment_id.tolist() == [0, 1, 2, -1]
  merged = segment(entropy, mask, jnp.array(True), entropy_threshold=0.0)
  assert merged.segment_id.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('stop_inside', [True, False])
def test_content(finished, stop_inside):
  mask = jnp.array([False, True, True, True])
  content = content_mask(mask, jnp.array(finished), stop_inside=stop_inside)
  assert content.tolist() == [False, True, True, not finished or stop_inside]


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('mask', ['0000', '0100', '1000', '0001'])
def test_stop_token_alone_or_nothing_has_no_segment(granularity, mask):
  mask = jnp.array([bit == '1' for bit in mask])
  options = {'granularity': granularity, 'stop_inside': True}
  segments = segment(jnp.full(4, 9.0), mask, jnp.array(True), **options)
  assert segments.num_segments == 0
  assert not segments.start.any() and not segments.end.any()
  assert segments.segment_id.tolist() == [-1] * 4


def test_bad_settings_raise():
  mask, finished = jnp.ones(3, bool), jnp.array(True)
  with pytest.raises(ValueError, match=r"'word'.*segment.*token.*bandit"):
    segment(jnp.zeros(3), mask, finished, granularity='word')
  with pytest.raises(ValueError, match='min_length=0'):
    segment(jnp.zeros(3), mask, finished, min_length=0)


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
