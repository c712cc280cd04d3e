"""How often one model's responses beat another's, also at equal length.

Not here: who says which response is better, a reward model or the truth.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from segjax.evaluation.intervals import bootstrap_mean, percentiles, resamples

RIDGE = 0.01  # λ below: weak, but perfectly separable preferences stay finite
_ITERATIONS = 100  # at most; a dozen do
_STEP = 2.0  # largest change of a coefficient per iteration


def outcomes(one: Num[np.ndarray, 'N'], other: Num[np.ndarray, 'N']) -> Float[np.ndarray, 'N']:
  """1 where the first is larger, 0 where the second is, 1/2 for a tie."""
  return (np.sign(one - other) + 1) / 2


def win_rate(
  outcome: Float[np.ndarray, 'N'], prompt: Int[np.ndarray, 'N'], seed: int
) -> dict[str, float | int | None]:
  """Mean outcome, a tie counting half, and its 95 % interval by bootstrap over prompts.

  The percentiles of a bootstrap, unlike mean ± 1.96 standard errors, never leave [0, 1].
  """
  return bootstrap_mean(outcome, prompt, seed)


def length_controlled(
  outcome: Float[np.ndarray, 'N'],
  length: Num[np.ndarray, 'N'],
  other_length: Num[np.ndarray, 'N'],
  prompt: Int[np.ndarray, 'N'],
  seed: int,
) -> dict[str, float | int | None]:
  """What the win rate would be if both responses were as long: σ(a), out of

  P(win) = σ(a + b tanh(Δ / s))     Δ = length - other_length, s = its standard deviation

  a, b = argmin Σ_i weight_i · cross-entropy(outcome_i, P_i) + λ/2 (a² + b²),  λ = 0.01

  The idea and the term of length are AlpacaEval 2's, Dubois et al. 2024,
  https://arxiv.org/abs/2404.04475. Its term for the difficulty of each of its own instructions, its
  penalty by gamed baselines and its l1 with cross-validation are left out: they need its own data.

  Args:
    outcome: 1 for a win, 0 for a loss, 1/2 for a tie.
    length: of the model's responses, in characters as there.
    other_length: of what they are compared with.
    prompt: which prompt each is of, 0 to P - 1.
    seed: of the bootstrap over prompts; s stays that of all responses.

  Returns:
    mean, low and high of σ(a), and the coefficient b as `length_effect`.
  """
  feature = length_feature(length, other_length)
  count = int(prompt.max()) + 1
  whole = fit(outcome, feature, np.ones((1, len(outcome))), np.zeros((1, 2)))
  draws = np.zeros(0)
  if count > 1:
    weights = (weight[:, prompt] for weight in resamples(count, seed))
    draws = np.concatenate([_sigmoid(fit(outcome, feature, w, whole)[:, 0]) for w in weights])
  rate = percentiles(_sigmoid(whole[0, 0]), draws, len(outcome))
  return rate | {'length_effect': float(whole[0, 1])}


def length_feature(
  length: Num[np.ndarray, 'N'], other_length: Num[np.ndarray, 'N']
) -> Float[np.ndarray, 'N']:
  """tanh(Δ / s), 0 where all differences are the same and there is nothing to tell apart by."""
  difference = np.asarray(length, float) - np.asarray(other_length, float)
  deviation = np.std(difference, ddof=1) if len(difference) > 1 else 0.0
  return np.tanh(difference / deviation) if deviation > 0 else np.zeros(len(difference))


def fit(
  outcome: Float[np.ndarray, 'N'],
  feature: Float[np.ndarray, 'N'],
  weight: Num[np.ndarray, 'D N'],
  start: Float[np.ndarray, '#D 2'],
) -> Float[np.ndarray, 'D 2']:
  """(a, b) of `length_controlled` for each of D weightings, by Newton's method with short steps."""
  found = np.repeat(start, len(weight) // len(start), axis=0)
  for _ in range(_ITERATIONS):
    p = _sigmoid(found[:, :1] + found[:, 1:] * feature)
    slope = weight * (outcome - p)
    curve = weight * p * (1 - p)
    gradient = np.stack([slope.sum(1), slope @ feature], 1) - RIDGE * found
    aa, ab, bb = curve.sum(1) + RIDGE, curve @ feature, curve @ feature**2 + RIDGE
    determinant = aa * bb - ab**2
    step = np.stack(
      [bb * gradient[:, 0] - ab * gradient[:, 1], aa * gradient[:, 1] - ab * gradient[:, 0]], 1
    )
    step = np.clip(step / determinant[:, None], -_STEP, _STEP)
    found = found + step
    if np.abs(step).max() < 1e-9:
      break
  return found


def _sigmoid(x):
  return (1 + np.tanh(x / 2)) / 2
