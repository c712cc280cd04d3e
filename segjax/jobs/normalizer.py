"""The location-aware normaliser: Mean(p) and Std(p) of a reward model's segment scores."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data.batches import batch_indices, chunks, take
from segjax.data.encoding import encode_pairs
from segjax.data.sources import load_rows
from segjax.jobs import stage as jobs
from segjax.jobs.stage import Stage
from segjax.report.console import say
from segjax.rl import normalizer
from segjax.train import segment_reward
from segjax.train.reward_step import Scorer, segment_statistics
from segjax.types import Normalizer


def run(stage: Stage) -> dict[str, Any]:
  """Fits the normaliser of config.reward_model.path on pairs; stores it in segment_reward.json."""
  s = stage.settings
  jobs.check_batch('normalizer.batch', s.normalizer.batch, stage)
  source = jobs.required(s.reward_model.path, 'reward_model.path')
  reference_path = jobs.required(s.reference.path or s.policy.path, 'reference.path')
  stored = segment_reward.read(source)
  segment_reward.check_tokenizer(stored, source, reference_path)
  named = dataclasses.replace(s.reward_model, normalizer='none')
  meaning = segment_reward.resolve(named, source, reference_path)
  config = jobs.network(stage, source)
  scorer = Scorer(
    config,
    jobs.network(stage, reference_path),
    meaning.granularity,
    meaning.entropy_threshold,
  )
  pairs = encode_pairs(
    load_rows(s.data.path, s.data.split, s.data.limit),
    jobs.tokenizer_of(stage, reference_path),
    jobs.limits(stage, config),
  )
  if len(pairs) > s.normalizer.pairs:
    pairs = take(pairs, batch_indices(len(pairs), s.normalizer.pairs, s.seed, 0))
  jobs.describe(stage, pairs)
  params = jobs.load(stage, source, config, 'scalar')
  reference = jobs.load(stage, reference_path, scorer.reference, 'language')

  found = []
  for rows, real in chunks(len(pairs), s.normalizer.batch):
    batch = pairs.gather(rows, stage.place)
    statistics = jax.device_get(segment_statistics(params, reference, batch, scorer=scorer))
    found.append([x[: 2 * real].reshape(-1) for x in statistics])
  position, score, end = (np.concatenate(parts) for parts in zip(*found, strict=True))
  kind = s.normalizer.kind
  if kind == 'auto':
    kind = 'scalar' if meaning.granularity == 'bandit' else 'regression'
  fitted = fit(kind, position[end], score[end])
  segment_reward.write(
    source,
    dataclasses.replace(
      stored or meaning,
      granularity=meaning.granularity,
      entropy_threshold=meaning.entropy_threshold,
      normalizer=fitted,
      normalizer_kind=kind,
    ),
  )
  values = {name: float(value) for name, value in vars(fitted).items()}
  say(
    f'{stage.name}: {kind} over {end.sum()} segments: '
    f'Mean(p) = {values["w_mean"]:.4f} ln p + {values["b_mean"]:.4f}, '
    f'Std(p) = {values["w_std"]:.4f} ln p + {values["b_std"]:.4f}'
  )
  return {'kind': kind, 'segments': int(end.sum())} | values


def fit(kind: str, position: np.ndarray, score: np.ndarray) -> Normalizer:
  """The normaliser of that kind over all segment scores given."""
  if kind == 'none':
    return Normalizer()
  if not len(score):
    raise ValueError('the normaliser has no segment to fit: no response of the data has one.')
  mask = jnp.ones(len(score), bool)
  if kind == 'scalar':
    return normalizer.fit_scalar(jnp.asarray(score), mask)
  return normalizer.fit_regression(jnp.asarray(position), jnp.asarray(score), mask)
