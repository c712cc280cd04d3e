import jax
import jax.numpy as jnp
import numpy as np
from fixtures.responses import make_batch
from fixtures.strategies import corrupted
from numpy.testing import assert_allclose

from segjax.rl import oracle, oracle_spreads
from segjax.rl.segmentation import segment, segment_at
from segjax.rl.spreads import dense_reward, min_credit


def cut(*starts, size):
  """Segments that begin at these tokens, of a response that fills the row."""
  boundary = jnp.zeros(size, bool).at[jnp.array(starts)].set(True)
  return segment_at(boundary, jnp.ones(size, bool), jnp.array(False))


def test_worked_entropy_weights():
  # Segments of 3, 2 and 1 tokens with z 6, 4 and -1: weights 1/6, 2/6, 3/6; none; alone.
  z = jnp.array([jnp.nan, 9, 6, 9, 4, -1])
  entropy = jnp.array([1.0, 2, 3, 0, 0, 5])
  segments, mask = cut(0, 3, 5, size=6), jnp.ones(6, bool)
  reward = dense_reward(z, segments, mask, spread='entropy_weighted', entropy=entropy)
  assert_allclose(reward, [1, 2, 3, 2, 2, -1], rtol=1e-6)


def test_worked_min_credit():
  # At T = 1 / ln 2 the weights of z = 0, 1, 3 are 1, 1/2, 1/8 over 13/8: 8, 4 and 1 over 13.
  z, segments = jnp.array([jnp.nan, 1, 0, jnp.nan, 3]), cut(0, 2, 3, size=5)
  credit = min_credit(z, segments, 1 / np.log(2))
  assert_allclose(credit, [0, 4 / 13, 0, 0, 3 / 13], rtol=1e-6)
  # A low temperature leaves the worst segment what it has, a high one all of them their share.
  z = jnp.array([0, 4.0, -2, 0, 6])
  assert_allclose(min_credit(z, segments, 1e-3), [0, 0, -2, 0, 0], atol=1e-6)
  assert_allclose(min_credit(z, segments, 1e6), [0, 4 / 3, -2 / 3, 0, 2], rtol=1e-4)


def test_min_credit_equals_the_oracle():
  batch = make_batch(5)

  @jax.jit
  @jax.vmap
  def run(entropy, mask, finished, z):
    segments = segment(entropy, mask, finished)
    return segments.end, min_credit(z, segments, 0.7)

  z = corrupted(batch.score, batch.mask)
  ends, credit = jax.device_get(run(batch.entropy, batch.mask, batch.finished, z))
  cases = batch.rows('entropy_after', 'mask', 'finished', 'score')
  for row, (entropy_after, mask, finished, score) in enumerate(cases):
    expected_ends = oracle.segment_ends(entropy_after, mask, finished, 'segment', 2.0)
    assert np.flatnonzero(ends[row]).tolist() == expected_ends
    expected = oracle_spreads.min_credit([score[end] for end in expected_ends], 0.7)
    assert_allclose(credit[row][expected_ends], expected, rtol=1e-5)
    assert not credit[row][~ends[row]].any()
