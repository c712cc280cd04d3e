"""Robust fit of a line.

Not here: what is fitted (`normalizer`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from segjax.rl.masked import at_least_float32, masked_sum

_ITERATIONS = 300
_HALVINGS = 40


def huber_fit(
  x: Float[Array, 'N'],
  y: Float[Array, 'N'],
  mask: Bool[Array, 'N'],
  *,
  weight: Float[Array, 'N'] | None = None,
  epsilon: float = 1.35,
  alpha: float = 1e-4,
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, '']]:
  """Huber regression of y on x with the scale of the residuals estimated along.

  minimise over w, b, s > 0:  Σ_i v_i [s + s H(u_i / s)] + α w²,  u_i = y_i − w x_i − b
  H(z) = z² if |z| < ε, else 2 ε |z| − ε²

  The same line as scikit-learn's HuberRegressor, v being its sample_weight. The objective is convex
  in (w, b, s) together and smooth, so minimising over s and over (w, b) in turn reaches the
  minimum: s by bisection, (w, b) by reweighted least squares. Where the inliers lie exactly on a
  line s goes to 0 and stops at ten times the rounding of y. See Owen 2007, "A robust hybrid of
  lasso and ridge regression", https://doi.org/10.1090/conm/443/08555.

  Args:
    x: abscissae.
    y: ordinates.
    mask: True on the points that count.
    weight: v ≥ 0 of each point; 1 by default. It may be NaN under the mask.
    epsilon: ε, in units of s, beyond which a residual is an outlier.
    alpha: α, ridge penalty on w.

  Returns:
    (w, b, s); all 0 if no point counts, and w = 0 if only one does.
  """
  x, y = at_least_float32(x), at_least_float32(y)
  weight = jnp.ones_like(y) if weight is None else at_least_float32(weight)
  mask = mask & (weight > 0)
  x, y, weight = (jnp.where(mask, array, 0) for array in (x, y, weight))
  smallest_scale = 10 * jnp.finfo(y.dtype).eps * jnp.maximum(1, jnp.max(jnp.abs(y)))

  def best_scale(w, b):
    return _best_scale(jnp.abs(y - w * x - b), weight, epsilon, smallest_scale)

  def step(_, state):
    w, b, scale = state
    residual = jnp.abs(y - w * x - b)
    # The quadratic that touches the objective here: weight 1 for an inlier, less for an outlier.
    bound = epsilon * scale
    w, b = _line(x, y, weight * (bound / jnp.maximum(residual, bound)), alpha * scale)
    return w, b, best_scale(w, b)

  w, b = _line(x, y, weight, jnp.zeros((), y.dtype))
  w, b, scale = jax.lax.fori_loop(0, _ITERATIONS, step, (w, b, best_scale(w, b)))
  return w, b, jnp.where(jnp.any(mask), scale, 0)


def r_squared(
  y: Float[Array, 'N'],
  fitted: Float[Array, 'N'],
  mask: Bool[Array, 'N'],
  weight: Float[Array, 'N'] | None = None,
) -> Float[Array, '']:
  """1 − Σ v (y − fitted)² / Σ v (y − ȳ)² over the points masked in; 0 if the y are all equal."""
  y = at_least_float32(y)
  weight = jnp.ones_like(y) if weight is None else at_least_float32(weight)
  total = masked_sum(weight, mask)
  y_mean = masked_sum(weight * y, mask) / jnp.where(total > 0, total, 1)
  residual = masked_sum(weight * jnp.square(y - fitted), mask)
  variation = masked_sum(weight * jnp.square(y - y_mean), mask)
  return jnp.where(variation > 0, 1 - residual / jnp.where(variation > 0, variation, 1), 0)


def _line(x, y, weight, ridge):
  """(w, b) that minimise Σ weight (y − w x − b)² + ridge w²."""
  tiny = jnp.finfo(y.dtype).tiny
  total = jnp.maximum(jnp.sum(weight), tiny)
  x_mean = jnp.sum(weight * x) / total
  y_mean = jnp.sum(weight * y) / total
  product = jnp.sum(weight * (x - x_mean) * (y - y_mean))
  square = jnp.sum(weight * jnp.square(x - x_mean))
  w = product / jnp.maximum(square + ridge, tiny)
  return w, y_mean - w * x_mean


def _best_scale(residual, weight, epsilon, smallest):
  """The s that minimises the objective for fixed |u|: the root of Σ v [1 − min(u²/s², ε²)].

  That slope rises with s and is not negative at max |u|, so halving brackets the root however many
  outliers there are.
  """
  log_low = jnp.log(smallest)
  log_high = jnp.log(jnp.maximum(jnp.max(jnp.where(weight > 0, residual, 0)), smallest))

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    excess = jnp.minimum(jnp.square(residual / jnp.exp(middle)), epsilon**2) - 1
    too_small = jnp.sum(weight * excess) > 0
    return jnp.where(too_small, middle, low), jnp.where(too_small, high, middle)

  low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (log_low, log_high))
  return jnp.exp((low + high) / 2)
