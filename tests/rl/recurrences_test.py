"""The loop of CPU and the parallel steps of other platforms compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.platforms import PATHS, jit_by_path
from fixtures.strategies import masks
from hypothesis import given
from numpy.testing import assert_allclose

from segjax.rl.recurrences import latest, linear_backwards, rank, spaced


@pytest.mark.parametrize('length', [1, 2, 37])
def test_linear_backwards_in_float64(length):
  a, b = np.random.default_rng(length).uniform(-1, 1, (2, length))
  expected, following = [], 0.0
  for t in reversed(range(length)):
    following = a[t] * following + b[t]
    expected.insert(0, following)
  with jax.enable_x64(True):
    for run in jit_by_path(linear_backwards).values():
      assert_allclose(run(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-12, atol=1e-12)


DISTANCES = (1, 2, 3, 7, 16, 20)


def others(mark):
  x = jnp.where(mark, jnp.arange(float(len(mark))), jnp.nan)
  return (
    latest(x, mark, jnp.array(-1.0)),
    latest(x, mark, jnp.array(-1.0), reverse=True),
    rank(mark),
    *(spaced(mark, distance) for distance in DISTANCES),
  )


OTHERS = jit_by_path(others)


@pytest.mark.parametrize('path', PATHS)
@given(mark=masks())
def test_the_others_exactly(path, mark):
  before, after, count, *kept = jax.device_get(OTHERS[path](mark))
  for t in range(len(mark)):
    marked = np.flatnonzero(mark)
    assert before[t] == max(marked[marked <= t], default=-1)
    assert after[t] == min(marked[marked >= t], default=-1)
    assert count[t] == t - max(marked[marked <= t], default=0) + 1
  for distance, got in zip(DISTANCES, kept, strict=True):
    expected = []
    for t in np.flatnonzero(mark):
      if not expected or t - expected[-1] >= distance:
        expected.append(t)
    assert np.flatnonzero(got).tolist() == expected


def test_the_platform_decides():
  spaced_by_two = jax.vmap(functools.partial(spaced, distance=2))
  traced = jax.jit(spaced_by_two).trace(jnp.ones((2, 64), bool))
  loops = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count('stablehlo.while')
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert loops == {'cpu': 1, 'cuda': 0, 'tpu': 0}
