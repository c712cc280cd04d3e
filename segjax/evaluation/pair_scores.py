"""Scores of preference pairs by a reward model or by DPO, and figures of these scores."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from segjax import processes
from segjax.data.batches import Pairs
from segjax.evaluation import reward_bench
from segjax.evaluation.intervals import wilson
from segjax.rl.pair_metrics import preference_metrics
from segjax.train.reward_scoring import PairScorer, evaluate_pairs
from segjax.types import PreferenceBatch


def score_pairs(
  params: Any,
  reference: Any,
  pairs: Pairs,
  scorer: PairScorer,
  batches: Iterable[tuple[np.ndarray, int]],
  gather: Callable[[Pairs, np.ndarray], PreferenceBatch],
) -> Float[np.ndarray, 'N 4']:
  """Returns (score of chosen, score of rejected, tokens of chosen, tokens of rejected) per pair.

  Args:
    params: parameters of the network that scores.
    reference: parameters of the reference; None where it is not run.
    batches: `data.batches.eval_batches` over the pairs.
    gather: (pairs, rows) -> these pairs on the devices.
  """
  scores = []
  for rows, num_real in batches:
    batch = gather(pairs, rows)
    score = evaluate_pairs(params, reference, batch, scorer=scorer)
    # The last batch repeats its last pair to be full.
    scores.append(processes.to_host(score)[:num_real])
  lengths = [side.lengths for side in (pairs.chosen, pairs.rejected)]
  return np.column_stack([np.concatenate(scores), *lengths])


def scored_pair_metrics(scored: Float[np.ndarray, 'N 4']) -> dict[str, float]:
  """Returns `rl.preference_metrics` of the output of `score_pairs`."""
  chosen, rejected = scored[:, :2].T.astype(np.float32)
  lengths = scored[:, 2:].T.astype(np.int32)
  metrics = jax.device_get(jax.jit(preference_metrics)(chosen, rejected, *lengths))
  return {name: float(value) for name, value in metrics.items()}


def pair_figures(scored: np.ndarray, subsets: list[str], truncated: np.ndarray) -> dict[str, Any]:
  """Returns figures of all pairs, of untruncated pairs, of each subset and RewardBench section.

  Args:
    scored: output of `score_pairs`.
    subsets: subset of each pair.
    truncated: whether a pair was truncated.

  Returns:
    `all`, `untruncated` (None if there are none), `subsets` by name: `rl.preference_metrics`,
    where the accuracy has its Wilson interval; `reward_bench`: see `reward_bench.section_scores`.
  """
  names = np.array(subsets)
  by_name = {name: _figures(scored[names == name]) for name in sorted(set(subsets))}
  accuracies = {name: values['accuracy']['mean'] for name, values in by_name.items()}
  return {
    'all': _figures(scored),
    'untruncated': _figures(scored[~truncated]) if not truncated.all() else None,
    'truncated': int(truncated.sum()),
    'subsets': by_name,
    'reward_bench': reward_bench.section_scores(accuracies),
  }


def _figures(scored: np.ndarray) -> dict[str, Any]:
  values = scored_pair_metrics(scored)
  n = len(scored)
  low, high = wilson(values['accuracy'] * n, n)
  return values | {'accuracy': {'mean': values['accuracy'], 'low': low, 'high': high, 'n': n}}
