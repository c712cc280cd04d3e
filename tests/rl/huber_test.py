import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl.huber import huber_fit, r_squared

SIZE = 1000
fit = jax.jit(huber_fit)


def fit_padded(x, y, weight=None):
  """Fits in one shape, with NaN outside the mask."""
  behind = np.full(SIZE - len(x), np.nan)
  weight = np.ones(len(x)) if weight is None else weight
  x_, y_, weight_ = (jnp.asarray(np.concatenate([a, behind]), jnp.float32) for a in (x, y, weight))
  values = fit(x_, y_, jnp.arange(SIZE) < len(x), weight=weight_)
  return [float(value) for value in values]


def objective(w, b, scale, x, y, weight=1.0, epsilon=1.35, alpha=1e-4):
  z = np.abs(y - w * x - b) / scale
  loss = np.where(z < epsilon, z**2, 2 * epsilon * z - epsilon**2)
  return np.sum(weight * (scale + scale * loss)) + alpha * w**2


def test_golden_exact_line_with_outliers():
  x = np.log(np.arange(1, 1001) / 1000)
  y = 0.7668 * x + 0.4705
  y[::37] += 5
  w, b, scale = fit_padded(x, y)
  assert_allclose([w, b], [0.7668, 0.4705], atol=1e-5)
  assert scale < 1e-4


def test_golden_few_points():
  keys = [125, 200, 250, 333, 375, 400, 500, 600, 625, 667, 750, 800, 875, 1000]
  y = [-2, -1.2, -0.45, -0.9, -0.2, -0.1, 0.2, 0.5, 0.6, 0.3, 1.05, 0.9, 1.0, 1.133333]
  got = fit_padded(np.log(np.array(keys) / 1000 + 1e-10), np.array(y))
  assert_allclose(got, [1.523962, 1.247126, 0.0617448], atol=1e-5)


# Weights: none, spread over a factor of 5, spread over one of 10,000 as counts of scores are.
@pytest.mark.parametrize(
  ('num_points', 'outliers', 'weights'),
  [
    (3, 0.0, 'none'),
    (5, 0.1, 'mild'),
    (14, 0.4, 'none'),
    (14, 0.1, 'counts'),
    (100, 0.4, 'mild'),
    (100, 0.0, 'counts'),
    (1000, 0.1, 'none'),
    (1000, 0.4, 'counts'),
  ],
)
def test_equals_scikit_learn(num_points, outliers, weights):
  linear_model = pytest.importorskip('sklearn.linear_model')
  rng = np.random.default_rng([num_points, int(10 * outliers)])
  x = np.log(np.sort(rng.uniform(0.001, 1, num_points)))
  y = 0.8 * x + 0.5 + rng.normal(size=num_points) * 0.3 + 5 * (rng.random(num_points) < outliers)
  weight = {
    'none': np.ones(num_points),
    'mild': rng.uniform(0.5, 2.5, num_points),
    'counts': np.round(10 ** rng.uniform(0, 4, num_points)),
  }[weights]
  if weights == 'mild':
    weight[::4] = 0
  got = fit_padded(x, y, weight)
  # Their default stops at a gradient of 1e-5; ask for the minimum itself. Only ratios of weights
  # to each other and to the penalty matter, and their search is at its best around 1.
  unit = weight.mean()
  theirs = linear_model.HuberRegressor(epsilon=1.35, alpha=1e-4 / unit, max_iter=20_000, tol=1e-10)
  theirs.fit(x[:, None], y, sample_weight=weight / unit)
  expected = [theirs.coef_[0], theirs.intercept_, theirs.scale_]
  if num_points > 5:  # of a few points two fit exactly, and their search stops early on s → 0
    assert_allclose(got, expected, atol=1e-4)
  # Ours stops above s = 0, which costs that much for each weight.
  case = x, y, weight
  assert objective(*got, *case) < objective(*expected, *case) + 1e-5 * weight.sum()


def test_float64_stays():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, y = jnp.asarray(rng.normal(size=(2, 50)))
    values = huber_fit(x, y, jnp.ones(50, bool))
    assert all(value.dtype == jnp.float64 for value in values)
    # At the minimum every direction goes up.
    best = objective(*values, x, y)
    for step in np.vstack([np.eye(3), -np.eye(3)]) * 1e-4:
      assert objective(*(np.array(values) + step), x, y) > best


@pytest.mark.parametrize(
  ('x', 'y', 'line'),
  [
    ([], [], [0, 0]),
    ([-1.0], [2.0], [0, 2]),
    ([-2.0, 0.0], [1.0, 2.0], [0.5, 2]),
    ([-2.0, -1.0, 0.0], [1.0, 1.5, 2.0], [0.5, 2]),
    ([-2.0, -1.0, 0.0], [3.0, 3.0, 3.0], [0, 3]),
    ([-2.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0, 0]),
  ],
  ids=['none', 'one', 'two', 'three in a line', 'constant', 'zero'],
)
def test_exact_fits(x, y, line):
  w, b, scale = fit_padded(np.array(x), np.array(y))
  assert_allclose([w, b], line, atol=1e-5)
  assert 0 <= scale < 1e-4


def test_a_weight_is_a_number_of_copies():
  rng = np.random.default_rng(1)
  x, y, copies = rng.normal(size=20), rng.normal(size=20), rng.integers(0, 5, 20)
  copied = fit_padded(np.repeat(x, copies), np.repeat(y, copies))
  assert_allclose(fit_padded(x, y, copies), copied, atol=1e-5)


def test_r_squared():
  y, mask = jnp.array([1.0, 2.0, 3.0, 9.0]), jnp.array([True, True, True, False])
  assert r_squared(y, y, mask) == 1
  assert r_squared(y, jnp.full(4, 2.0), mask) == 0
  assert r_squared(jnp.ones(4), jnp.ones(4), mask) == 0  # nothing to explain
  assert r_squared(y, y, jnp.zeros(4, bool)) == 0
  # 1, 2, 2, 2 with mean 7/4: a variation of 3/4, and residuals of 3/4² + 3/4²/3 about that mean.
  weight = jnp.array([1.0, 3.0, 0.0, jnp.nan])
  assert_allclose(r_squared(y, jnp.full(4, 1.75), mask, weight), 0, atol=1e-6)
  assert_allclose(r_squared(y, jnp.full(4, 2.0), mask, weight), 1 - 1 / 0.75, rtol=1e-6)


def test_wrong_arrays_raise():
  with pytest.raises(TypeCheckError):
    huber_fit(jnp.zeros(3), jnp.zeros(4), jnp.ones(3, bool))
  with pytest.raises(TypeCheckError):
    huber_fit(jnp.zeros(3, int), jnp.zeros(3), jnp.ones(3, bool))
