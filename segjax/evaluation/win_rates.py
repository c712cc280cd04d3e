"""Win rates: how often a model's responses beat those of a baseline, also at equal length.

Which response is better is decided elsewhere, by a reward model or a gold reward.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from segjax.evaluation.intervals import bootstrap_mean, percentile_interval, resamples

RIDGE = 0.01  # λ below: weak, but keeps the coefficients of separable preferences finite
_MAX_ITERATIONS = 100  # about a dozen are needed
_MAX_STEP = 2.0  # largest change of a coefficient per iteration


def outcomes(first: Num[np.ndarray, 'N'], second: Num[np.ndarray, 'N']) -> Float[np.ndarray, 'N']:
  """Returns 1 where the first is larger, 0 where the second is larger, 1/2 for a tie."""
  return (np.sign(first - second) + 1) / 2


def win_rate(
  outcome: Float[np.ndarray, 'N'], prompt: Int[np.ndarray, 'N'], seed: int
) -> dict[str, float | int | None]:
  """Returns the mean outcome and its 95 % interval by bootstrap over prompts.

  The percentiles of a bootstrap, unlike mean ± 1.96 standard errors, never leave [0, 1].
  """
  return bootstrap_mean(outcome, prompt, seed)


def length_controlled(
  outcome: Float[np.ndarray, 'N'],
  length: Num[np.ndarray, 'N'],
  baseline_length: Num[np.ndarray, 'N'],
  prompt: Int[np.ndarray, 'N'],
  seed: int,
) -> dict[str, float | int | None]:
  """Estimates the win rate at equal length of both responses, σ(a), by logistic regression:

  P(win) = σ(a + b tanh(Δ / s))     Δ = length - baseline_length, s = its standard deviation

  a, b = argmin Σ_i weight_i · cross-entropy(outcome_i, P_i) + λ/2 (a² + b²),  λ = 0.01

  The idea and the length term are AlpacaEval 2's, Dubois et al. 2024,
  https://arxiv.org/abs/2404.04475. Its term for the difficulty of each instruction, its penalty by
  gamed baselines and its l1 with cross-validation are left out: they need AlpacaEval's data.

  Args:
    outcome: 1 for a win, 0 for a loss, 1/2 for a tie.
    length: length of the model's responses, in characters as in AlpacaEval.
    baseline_length: length of the responses they are compared with.
    prompt: the index of each response's prompt, 0 to P - 1.
    seed: seed of the bootstrap over prompts; s remains that of all responses.

  Returns:
    mean, low and high of σ(a), and the coefficient b as `length_effect`.
  """
  feature = length_feature(length, baseline_length)
  count = int(prompt.max()) + 1
  estimate = fit_logistic(outcome, feature, np.ones((1, len(outcome))), np.zeros((1, 2)))
  draws = np.zeros(0)
  if count > 1:
    # A generator: the weights of all draws together would not fit in memory.
    weights = (times[:, prompt] for times in resamples(count, seed))
    # Each draw starts from the estimate on all responses: few iterations are left to do.
    fits = [fit_logistic(outcome, feature, weight, estimate) for weight in weights]
    draws = _sigmoid(np.concatenate(fits)[:, 0])
  rate = percentile_interval(_sigmoid(estimate[0, 0]), draws, len(outcome))
  return rate | {'length_effect': float(estimate[0, 1])}


def length_feature(
  length: Num[np.ndarray, 'N'], baseline_length: Num[np.ndarray, 'N']
) -> Float[np.ndarray, 'N']:
  """Returns tanh(Δ / s); 0 if all differences are equal, as they then explain no outcome."""
  difference = np.asarray(length, float) - np.asarray(baseline_length, float)
  deviation = np.std(difference, ddof=1) if len(difference) > 1 else 0.0
  return np.tanh(difference / deviation) if deviation > 0 else np.zeros(len(difference))


def fit_logistic(
  outcome: Float[np.ndarray, 'N'],
  feature: Float[np.ndarray, 'N'],
  weight: Num[np.ndarray, 'D N'],
  start: Float[np.ndarray, '#D 2'],
) -> Float[np.ndarray, 'D 2']:
  """Fits (a, b) of `length_controlled` for each of D weightings, by Newton's method.

  Steps are clipped, because a full step overshoots where preferences are nearly separable.

  Args:
    weight: weight of each response in each fit.
    start: initial coefficients.
  """
  coefficients = np.repeat(start, len(weight) // len(start), axis=0)
  for _ in range(_MAX_ITERATIONS):
    p = _sigmoid(coefficients[:, :1] + coefficients[:, 1:] * feature)
    slope = weight * (outcome - p)
    curve = weight * p * (1 - p)
    gradient = np.stack([slope.sum(1), slope @ feature], 1) - RIDGE * coefficients
    aa, ab, bb = curve.sum(1) + RIDGE, curve @ feature, curve @ feature**2 + RIDGE
    determinant = aa * bb - ab**2
    step = np.stack(
      [bb * gradient[:, 0] - ab * gradient[:, 1], aa * gradient[:, 1] - ab * gradient[:, 0]], 1
    )
    step = np.clip(step / determinant[:, None], -_MAX_STEP, _MAX_STEP)
    coefficients = coefficients + step
    if np.abs(step).max() < 1e-9:
      break
  return coefficients


def _sigmoid(x):
  return (1 + np.tanh(x / 2)) / 2
