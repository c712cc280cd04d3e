"""Statistics of arms over seeds: paired differences, their intervals, corrections, verdicts.

The seed is the unit: its language rows, models and prompts are its own, and responses to one prompt
share that prompt. Arms of a seed share all but what they differ in, so that they are paired. IQM
and probability of improvement are those of Agarwal et al. 2021, https://arxiv.org/abs/2108.13264.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.special import ndtr, stdtrit

from segjax.config.study_arms import MIN_SEEDS
from segjax.evaluation.intervals import percentile_interval

NUM_DRAWS = 10_000  # of a bootstrap: the expanded percentiles of few seeds lie far out
LEVEL = 0.95
_MAX_EXACT = 14  # seeds up to which all assignments of signs are counted

Estimate = dict[str, float | int | None]  # mean, low, high, n
Prompts = Float[np.ndarray, '_']  # a value of each prompt of a seed, whose number may differ


@dataclasses.dataclass(frozen=True)
class Comparison:
  """An arm against the baseline, paired by seed.

  Attributes:
    difference: of the means, arm - baseline, with its interval; n counts the seeds that have both.
    improvement: probability that a run of the arm is better than one of the baseline, with its
      interval.
    p: of the hypothesis that the sign of each seed's difference is chance; None below two seeds.
    adjusted_p: after Holm, among the comparisons that are made together; None outside of them.
  """

  arm: str
  baseline: str
  difference: Estimate
  improvement: Estimate
  p: float | None
  adjusted_p: float | None = None


def compare(
  arm: str, baseline: str, values: Mapping[int, Prompts], others: Mapping[int, Prompts]
) -> Comparison:
  """Compares an arm with the baseline.

  All arms of a seed hold out the same prompts in the same order. One that samples several responses
  to a prompt reaches fewer of them during training: the first ones, by which the two are compared.

  Args:
    arm: name of the arm.
    baseline: name of the baseline.
    values: of the arm, by seed.
    others: of the baseline, by seed; seeds of one alone are left out.
  """
  seeds = sorted(set(values) & set(others))
  count = {seed: min(len(values[seed]), len(others[seed])) for seed in seeds}
  own, other = ([side[seed][: count[seed]] for seed in seeds] for side in (values, others))
  pairs = [np.array([np.mean(prompts) for prompts in side]) for side in (own, other)]
  return Comparison(
    arm,
    baseline,
    hierarchical_interval([x - y for x, y in zip(own, other, strict=True)]),
    probability_of_improvement(*pairs),
    sign_flip_p(pairs[0] - pairs[1]) if len(seeds) > 1 else None,
  )


def hierarchical_interval(values: Sequence[Prompts], seed: int = 0) -> Estimate:
  """Returns the mean of the seeds' means and its 95 % interval, by resampling seeds, then prompts.

  Each draw takes S of the S seeds with replacement and, in each of them, its P prompts with
  replacement. The interval is the expanded percentile one of Hesterberg 2014,
  https://arxiv.org/abs/1411.5279: percentiles of the draws at

  Φ(± √(S / (S - 1)) t(0.975, S - 1))

  because plain percentiles of S = 5 or 10 seeds cover the mean in fewer than 95 % of studies. Below
  MIN_SEEDS there is no interval.

  Args:
    values: of each seed, the prompts' values.
    seed: seed of the draws.
  """
  count = len(values)
  mean = np.mean([np.mean(x) for x in values]) if count else np.nan
  if count < MIN_SEEDS:
    return percentile_interval(mean, np.zeros(0), count)
  return _expanded_interval(mean, hierarchical_draws(values, np.random.default_rng(seed)), count)


def _expanded_interval(value: Any, draws: Float[np.ndarray, 'D'], count: int) -> Estimate:
  """Returns a statistic of `count` seeds with its expanded percentiles."""
  tail = expanded_tail(count)
  low, high = np.quantile(draws, [tail, 1 - tail])
  return {'mean': float(value), 'low': float(low), 'high': float(high), 'n': count}


def _seed_draws(count: int) -> Int[np.ndarray, 'D S']:
  """Returns the seeds of each draw of a bootstrap of seeds."""
  return np.random.default_rng(0).integers(count, size=(NUM_DRAWS, count))


def hierarchical_draws(
  values: Sequence[Prompts], rng: np.random.Generator, draws: int = NUM_DRAWS
) -> Float[np.ndarray, 'D']:
  """Returns the mean over seeds in each draw of a bootstrap of seeds, then prompts."""
  count = len(values)
  chosen = rng.integers(count, size=(draws, count))
  means = np.empty(chosen.shape)
  for index, prompts in enumerate(values):
    is_chosen = chosen == index
    rows = rng.integers(len(prompts), size=(int(is_chosen.sum()), len(prompts)))
    means[is_chosen] = prompts[rows].mean(1)
  return means.mean(1)


def expanded_tail(count: int) -> float:
  """Returns Φ(-√(S / (S - 1)) t(0.975, S - 1)), the share of draws below an interval of S seeds."""
  quantile = stdtrit(count - 1, (1 + LEVEL) / 2)
  return float(ndtr(-((count / (count - 1)) ** 0.5) * quantile))


def sign_flip_p(differences: Float[np.ndarray, 'S']) -> float:
  """Returns P(|Σ ± d_s| ≥ |Σ d_s|) over random signs: the two-sided permutation test of pairs.

  Valid at any number of seeds if a difference is as likely as its negative where arms are equal,
  without a normal distribution. Its smallest value is 2 / 2^S: 0.06 at 5 seeds, 0.002 at 10.
  """
  count = len(differences)
  if count <= _MAX_EXACT:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
  else:
    signs = np.random.default_rng(0).choice((1.0, -1.0), (2**_MAX_EXACT, count))
    signs[0] = 1.0  # the observed one is among them, so that p is never 0
  sums = np.abs(signs @ differences)
  return float(np.mean(sums >= sums[0] - 1e-12 * np.abs(differences).sum()))


def holm(p: Sequence[float]) -> list[float]:
  """Returns p-values adjusted after Holm 1979: max over smaller p_(j) of (m - j + 1) p_(j)."""
  adjusted, highest = [0.0] * len(p), 0.0
  for rank, index in enumerate(np.argsort(p, kind='stable')):
    highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
    adjusted[index] = highest
  return adjusted


def with_holm(comparisons: Sequence[Comparison], family: Sequence[str]) -> list[Comparison]:
  """Returns the comparisons with p-values adjusted among those whose arm is in `family`."""
  members = [c for c in comparisons if c.arm in family and c.p is not None]
  adjusted = dict(zip((c.arm for c in members), holm([c.p for c in members]), strict=True))
  return [dataclasses.replace(c, adjusted_p=adjusted.get(c.arm)) for c in comparisons]


def iqm(values: Num[np.ndarray, '*D S']) -> Num[np.ndarray, '*D']:
  """Returns the interquartile mean: without the floor(S / 4) lowest and as many highest values."""
  count = values.shape[-1]
  cut = count // 4
  return np.asarray(np.sort(values, -1)[..., cut : count - cut].mean(-1))


def iqm_interval(values: Num[np.ndarray, 'S']) -> Estimate:
  """Returns `iqm` with its 95 % interval, by resampling seeds; none below MIN_SEEDS."""
  count = len(values)
  if count < MIN_SEEDS:
    return percentile_interval(float(iqm(values)) if count else np.nan, np.zeros(0), count)
  return _expanded_interval(iqm(values), iqm(values[_seed_draws(count)]), count)


def probability_of_improvement(
  values: Num[np.ndarray, 'S'], others: Num[np.ndarray, 'S']
) -> Estimate:
  """Returns P(X > Y) + P(X = Y) / 2 over all pairs of a run of each arm, and its 95 % interval.

  Seeds are resampled, and with them the runs of both arms; below MIN_SEEDS there is no interval.
  """
  count = len(values)
  wins = (1 + np.sign(np.subtract.outer(values, others))) / 2
  if count < MIN_SEEDS:
    return percentile_interval(wins.mean() if count else np.nan, np.zeros(0), count)
  drawn = _seed_draws(count)
  draws = wins[drawn[:, :, None], drawn[:, None, :]].mean((1, 2))
  return _expanded_interval(wins.mean(), draws, count)


def verdict(comparison: Comparison, where: str) -> str:
  """Returns a comparison in words, which claim a difference only if the interval excludes 0.

  Args:
    where: what was compared, such as 'at 8 nats'.
  """
  c, d = comparison, comparison.difference
  seeds = f'{d["n"]} seed{"" if d["n"] == 1 else "s"}'
  if d['low'] is None:
    return f'{c.arm} and {c.baseline}: no verdict from {seeds} {where}'
  if d['low'] <= 0 <= d['high']:
    return f'{c.arm} and {c.baseline} are not told apart {where} at {seeds}'
  sign = 1 if d['mean'] > 0 else -1
  better, worse = (c.arm, c.baseline) if sign > 0 else (c.baseline, c.arm)
  low, high = sorted((sign * d['low'], sign * d['high']))
  text = f'{better} > {worse} by {sign * d["mean"]:.2f} [{low:.2f}, {high:.2f}] {where}'
  if c.adjusted_p is not None and c.adjusted_p > 1 - LEVEL:
    text += f' (p = {c.adjusted_p:.2g} after Holm, so not among all comparisons)'
  return text
