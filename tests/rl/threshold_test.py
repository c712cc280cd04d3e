import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.strategies import corrupted, responses
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.threshold import threshold_curve, threshold_for_length, threshold_for_quantile

ROWS = 4
by_quantile = jax.jit(threshold_for_quantile)
by_length = jax.jit(threshold_for_length, static_argnames='min_length')
curve = jax.jit(threshold_curve, static_argnames='min_length')


@st.composite
def batches(draw):
  """(entropy_after, entropy, mask, finished) of a few responses; NaN where it must not matter."""
  rows = [draw(responses()) for _ in range(ROWS)]
  after, entropy, mask, finished = (np.stack(arrays) for arrays in zip(*rows, strict=True))
  first = mask & ~np.pad(mask[:, :-1], ((0, 0), (1, 0)))
  return after, corrupted(entropy, mask & ~first), mask, finished


def statistics(batch, threshold, min_length):
  """(mean segment length, segments per response that has any), by the loops of the oracle."""
  after, _, mask, finished = batch
  tokens = count = filled = 0
  for row in zip(after.tolist(), mask.tolist(), finished.tolist(), strict=True):
    ends = oracle.segment_ends(*row, 'segment', threshold, min_length)
    spans = oracle.spans(ends, oracle.run_of(row[1])[0])
    tokens += sum(last - first + 1 for first, last in spans)
    count += len(ends)
    filled += bool(ends)
  return tokens / max(count, 1), count / max(filled, 1)


def candidates(batch):
  """Entropies of the tokens that could start a segment, sorted."""
  _, entropy, mask, finished = batch
  entropies = []
  for row, row_mask, is_finished in zip(entropy, mask.tolist(), finished, strict=True):
    begin, stop = oracle.run_of(row_mask)
    entropies.append(row[begin + 1 : max(stop - is_finished, begin + 1)])
  return np.sort(np.concatenate(entropies))


@given(batch=batches(), quantile=st.floats(0, 1))
def test_quantile_is_that_of_numpy(batch, quantile):
  entropies = candidates(batch)
  expected = np.quantile(entropies, quantile) if len(entropies) else 0
  assert_allclose(by_quantile(*batch[1:], quantile), expected, atol=1e-5)


@pytest.mark.parametrize('min_length', [1, 3])
@given(batch=batches(), target=st.sampled_from([0.5, 1.0, 1.7, 2.5, 4.0, 6.0, 100.0]))
def test_length_is_the_nearest_of_all(min_length, batch, target):
  threshold = float(by_length(*batch[1:], target, min_length=min_length))
  levels = np.unique(np.append(candidates(batch), 0))
  every = [statistics(batch, level, min_length)[0] for level in levels]
  assert all(np.diff(every) >= 0)  # what bisection needs
  length, segments = statistics(batch, threshold, min_length)
  distance = np.abs(np.log(np.maximum(every, 1)) - np.log(target))
  assert_allclose(abs(np.log(max(length, 1)) - np.log(target)), min(distance), atol=1e-6)
  # Midway between neighbours, which are quarters.
  assert np.min(np.abs(levels - threshold)) >= 0.125 - 1e-6
  got = curve(*batch[1:], jnp.array([threshold, 0, 2.0]), min_length=min_length)
  expected = [statistics(batch, c, min_length) for c in (threshold, 0, 2.0)]
  assert_allclose(np.stack(got, axis=1), expected, rtol=1e-6)
  assert_allclose((length, segments), expected[0])


def test_worked():
  # Content of both: 8 tokens. Above .5 start two more segments, above 1 one, above 2 none.
  entropy = jnp.array([[9, 0.5, 1.0, 2.0, 9], [9, 0.25, 0.25, 0.25, 9]])
  mask, finished = jnp.ones((2, 5), bool), jnp.array([True, True])
  batch = entropy, mask, finished
  # Lengths by threshold: 0: 1, .25: 8/5, .5: 8/4, 1: 8/3, 2: 8/2.
  for target, threshold in [(1, 0.125), (1.5, 0.375), (2, 0.75), (2.7, 1.5), (50, 3.0)]:
    assert_allclose(by_length(*batch, target), threshold)
  length, segments = curve(*batch, jnp.array([0.375, 1.5]))
  assert_allclose(length, [8 / 5, 8 / 3])
  assert_allclose(segments, [5 / 2, 3 / 2])
  assert_allclose(by_quantile(*batch, 0.5), 0.375)


def test_entropies_next_to_each_other():
  """Where floating point has no middle, the cut falls between the two all the same."""
  near = np.nextafter(np.float32(1), np.float32(2))
  entropy = jnp.array([[9, 1.0, near, near]], jnp.float32)
  threshold = by_length(entropy, jnp.ones((1, 4), bool), jnp.array([False]), 4 / 3)
  assert threshold == 1


@pytest.mark.parametrize('mask', [0, 1], ids=['empty', 'a stop token each'])
def test_nothing_to_look_at(mask):
  batch = (
    jnp.full((2, 3), jnp.nan),
    jnp.zeros((2, 3), bool).at[:, 1].set(bool(mask)),
    jnp.ones(2, bool),
  )
  assert by_quantile(*batch, 0.5) == 0
  assert np.isfinite(by_length(*batch, 3.0))
  assert_allclose(curve(*batch, jnp.array([1.0])), [[0], [0]])


def test_no_array_is_larger_than_the_batch():
  """512 responses of 1,024 tokens fit with room to spare, however many thresholds are tried."""
  batch = [jax.ShapeDtypeStruct(*s) for s in [((512, 1024), jnp.float32), ((512, 1024), bool)]]
  batch.append(jax.ShapeDtypeStruct((512,), bool))
  size = 512 * 1024 * 4
  for run, last in ((curve, jax.ShapeDtypeStruct((50,), jnp.float32)), (by_length, 20.0)):
    memory = run.lower(*batch, last).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20 * size


def test_precision():
  rest = jnp.ones((1, 4), bool), jnp.array([False])
  for dtype in (jnp.bfloat16, jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
      for find in (threshold_for_quantile, threshold_for_length):
        threshold = jax.eval_shape(find, jnp.ones((1, 4), dtype), *rest, 0.5)
        assert threshold.dtype == jnp.promote_types(dtype, jnp.float32)


def test_bad_arguments_raise():
  batch = jnp.ones((1, 4)), jnp.ones((1, 4), bool), jnp.array([False])
  with pytest.raises(ValueError, match='min_length=0'):
    threshold_for_length(*batch, 2.0, min_length=0)
  with pytest.raises(TypeCheckError):
    threshold_for_quantile(*(array[0] for array in batch), 0.5)
