import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.responses import make_batch
from fixtures.strategies import corrupted, masks, numbers, responses
from hypothesis import given

from segjax.rl import cuts, oracle, oracle_cuts
from segjax.rl.cuts import CUTS, Response
from segjax.rl.segmentation import segment_at

NAN = jnp.nan


def cut(name, signal, *, ids=None, closes=None, finished=True, **options):
  """Returns the segment of each token of a response that fills the row."""
  mask = jnp.ones(len(signal), bool)
  arrays = [None if x is None else jnp.asarray(x) for x in (ids, closes)]
  response = Response(mask, jnp.array(finished), jnp.asarray(signal), *arrays)
  boundary = CUTS[name].function(response, **options)
  return segment_at(boundary, mask, jnp.array(finished)).segment_id.tolist()


def test_worked_examples():
  signal = [9.0, 0, 3, 3, 1, 9]
  assert cut('entropy', signal, entropy_threshold=2) == [0, 0, 1, 2, 2, -1]
  # Below one in two, strictly: ln 0.5 itself is no cut.
  logprob = np.log(np.float32([0.1, 0.9, 0.4, 0.5, 0.01, 0.1]))
  assert cut('low_probability', logprob, probability_threshold=0.5) == [0, 0, 1, 1, 2, -1]
  # Jumps by 2 up and down, by 1 not; what the score before the response is does not matter.
  score = [NAN, 0, 1, 3, 1, 1]
  assert cut('score_jump', score, jump_threshold=1) == [0, 0, 0, 1, 2, -1]
  assert cut('fixed_length', signal, segment_length=3) == [0, 0, 0, 1, 1, -1]
  # a . . b . <stop>: a run of delimiters stays together, the ends of segments do not.
  closes = np.array([0, 1, 1, 0, 1, 0], bool)
  assert cut('delimiter', signal, closes=closes) == [0, 0, 0, 1, 1, -1]
  assert cut('function', signal, closes=closes) == [0, 0, 1, 2, 2, -1]


def test_worked_controls(monkeypatch):
  # Entropy makes segments of 3, 1, 2 and 1 tokens before the stop token, at 0, 3, 4 and 6.
  signal, ids = [0, 0, 0, 9, 9, 0, 9, 0.0], np.arange(8)
  draw = [5, 1, 8, 2, 0, 6, 7, 3]
  monkeypatch.setattr(cuts, '_draws', lambda *_: jnp.array(draw, jnp.uint32))
  options = {'ids': ids, 'entropy_threshold': 2}
  # The draws at their ends 2, 3, 5 and 6 are 8, 2, 6 and 7: the order is 1, 2, 1, 3.
  assert cut('shuffled_entropy', signal, **options) == [0, 1, 1, 2, 3, 3, 3, -1]
  # The smallest draws of tokens 1 to 6 are 0, 1 and 2, at 4, 1 and 3.
  assert cut('random', signal, **options) == [0, 1, 1, 2, 3, 3, 3, -1]
  # With two tokens at least, entropy cuts at 3 and 6. Of 7 tokens 5 are left without two; the
  # smallest draws of 1 to 4 are at 1 and 4, and move to 2 and 6.
  pairs = options | {'min_segment_length': 2}
  assert cut('random', signal, **pairs) == [0, 0, 1, 1, 1, 1, 2, -1]
  # The segments of 3, 3 and 1 with draws 8, 6 and 7: the short one comes to lie in the middle.
  assert cut('shuffled_entropy', signal, **pairs) == [0, 0, 0, 1, 2, 2, 2, -1]


@jax.jit
def every_cut(mask, finished, signal, closes):
  response = Response(mask, finished, signal, closes=closes)
  boundaries = {
    'low_probability': cuts.low_probability(response, probability_threshold=0.3),
    'score_jump': cuts.score_jump(response, jump_threshold=1.5),
    'fixed_length': cuts.fixed_length(response, segment_length=3),
    'delimiter': cuts.delimiter(response),
    'function': cuts.function(response),
  }
  return {name: segment_at(b, mask, finished).start for name, b in boundaries.items()}


@given(response=responses(), signal=numbers(), closes=masks())
def test_equal_the_oracle(response, signal, closes):
  _, _, mask, finished = response
  begin, stop = oracle.run_of(mask.tolist())
  content = range(begin, max(begin, stop - bool(finished)))
  start = jax.device_get(every_cut(mask, finished, corrupted(-abs(signal), mask), closes))
  score = (-abs(signal)).tolist()
  expected = {
    'low_probability': oracle_cuts.low_probability(content, score, 0.3),
    'score_jump': oracle_cuts.score_jump(content, score, 1.5),
    'fixed_length': list(content[::3]),
    'delimiter': oracle_cuts.at(content, lambda t: closes[t - 1] and not closes[t]),
    'function': oracle_cuts.at(content, lambda t: closes[t - 1]),
  }
  assert {name: np.flatnonzero(x).tolist() for name, x in start.items()} == expected


@jax.jit
@jax.vmap
def controls(mask, finished, entropy, ids):
  response = Response(mask, finished, entropy, ids)
  results = {'draw': cuts._draws(response, 0)}
  for n in (1, 3):
    options = {'entropy_threshold': 2.0, 'min_segment_length': n}
    results[f'entropy {n}'] = segment_at(entropy > 2, mask, finished, min_length=n).start
    for name in ('shuffled_entropy', 'random'):
      boundary = CUTS[name].function(response, **options)
      results[f'{name} {n}'] = segment_at(boundary, mask, finished).start
  return results


def test_controls_equal_the_oracle():
  batch = make_batch(3)
  ids = np.random.default_rng(3).integers(0, 1 << 31, batch.mask.shape, np.int32)
  entropy = corrupted(batch.entropy, batch.mask)
  results = jax.device_get(controls(batch.mask, batch.finished, entropy, ids))
  for row, (mask, finished) in enumerate(batch.rows('mask', 'finished')):
    begin, stop = oracle.run_of(mask)
    content = range(begin, max(begin, stop - finished))
    draw = results['draw'][row].tolist()
    starts = {name: np.flatnonzero(x[row]).tolist() for name, x in results.items()}
    for n in (1, 3):
      by_entropy, shuffled, cut_at_random = (
        starts[f'{name} {n}'] for name in ('entropy', 'shuffled_entropy', 'random')
      )
      assert shuffled == oracle_cuts.shuffled(content, by_entropy, draw)
      assert cut_at_random == oracle_cuts.random(content, by_entropy, draw, n)
      assert len(cut_at_random) == len(by_entropy)
      assert all(np.diff(cut_at_random) >= n)
      lengths = [sorted(np.diff([*x, content.stop])) for x in (by_entropy, shuffled)]
      assert lengths[0] == lengths[1]


@functools.partial(jax.jit, static_argnames='seed')
def both_controls(mask, finished, entropy, ids, seed=0):
  response = Response(mask, finished, entropy, ids)
  options = {'entropy_threshold': 2.0}
  names = ('shuffled_entropy', 'random')
  return [CUTS[name].function(response, shuffle_seed=seed, **options) for name in names]


def test_controls_depend_on_the_text_and_the_seed():
  rng = np.random.default_rng(0)
  ids, entropy = rng.integers(0, 99, 40), rng.uniform(0, 4, 40)
  plain = [
    np.flatnonzero(x) for x in both_controls(np.ones(40, bool), np.array(False), entropy, ids)
  ]
  assert all(len(x) > 5 for x in plain)
  # In a longer row behind a prompt, before padding, with a stop token, beside another row.
  row_ids, row_entropy = rng.integers(0, 99, 70), rng.uniform(0, 4, 70)
  row_ids[13:53], row_entropy[13:53] = ids, entropy
  mask = (np.arange(70) >= 13) & (np.arange(70) < 54)
  rows = [np.stack([x, np.roll(x, 1)]) for x in (mask, row_entropy, row_ids)]
  padded = jax.vmap(both_controls)(rows[0], np.array([True, True]), rows[1], rows[2])
  for name, marks in zip(plain, padded, strict=True):
    assert np.flatnonzero(marks[0])[: len(name)].tolist() == (name + 13).tolist()
    assert (np.flatnonzero(marks[1]) - 1).tolist() == np.flatnonzero(marks[0]).tolist()
  other = ids.copy()
  other[20] += 1
  for changed in (
    both_controls(np.ones(40, bool), np.array(False), entropy, other),
    both_controls(np.ones(40, bool), np.array(False), entropy, ids, seed=1),
  ):
    assert all(
      np.flatnonzero(x).tolist() != y.tolist() for x, y in zip(changed, plain, strict=True)
    )


def test_controls_are_uniform():
  # Segments of 1, 2 and 3 tokens: 6 orders, and 10 ways to cut 6 tokens twice.
  entropy, size = np.array([0, 9, 0, 9, 0, 0.0]), 6000
  ids = np.stack(np.unravel_index(np.arange(size), (10, 10, 10, 10, 10, 10)), axis=1)
  mask, finished = np.ones((size, 6), bool), np.zeros(size, bool)
  marks = jax.vmap(both_controls)(mask, finished, np.tile(entropy, (size, 1)), ids)
  for mark, ways in zip(marks, (6, math.comb(5, 2)), strict=True):
    count = collections.Counter(map(bytes, np.asarray(mark)[:, 1:]))
    assert len(count) == ways
    share = np.array(list(count.values())) / size
    assert abs(share - 1 / ways).max() < 5 * math.sqrt(1 / ways / size)


def test_no_segment_may_be_empty():
  with pytest.raises(ValueError, match='segment_length=0'):
    cuts.fixed_length(Response(jnp.ones(3, bool), jnp.array(True)), segment_length=0)
