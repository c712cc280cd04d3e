"""The location-aware normaliser: Mean(p) and Std(p) of a reward model's segment scores."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data.batches import batch_indices, chunks, take
from segjax.data.encoding import encode_pairs
from segjax.jobs import stage as jobs
from segjax.jobs.stage import Stage
from segjax.report.console import track
from segjax.rl import normalizer
from segjax.train import segment_reward
from segjax.train.reward_step import Scorer, segment_statistics
from segjax.types import Normalizer

_fit_regression = jax.jit(normalizer.fit_regression)  # op by op, compiling takes seconds


def run(stage: Stage) -> dict[str, Any]:
  """Fits the normaliser of config.reward_model.path on pairs; stores it in segment_reward.json."""
  s = stage.settings
  source = jobs.checkpoint(s.reward_model.path, 'reward_model.path')
  if not os.access(source, os.W_OK):
    raise ValueError(
      f'config.reward_model.path: {source} cannot be written to, and the normaliser belongs there; '
      'copy the reward model to a directory of yours.'
    )
  reference_path = jobs.checkpoint(s.reference.path, 'reference.path')
  stored = segment_reward.read(source)
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
    jobs.rows(stage), jobs.tokenizer_of(stage, reference_path), jobs.limits(stage, config)
  )
  if len(pairs) > s.normalizer.pairs:
    pairs = take(pairs, batch_indices(len(pairs), s.normalizer.pairs, s.seed, 0))
  jobs.describe(stage, pairs)
  params = jobs.load(stage, source, config, 'scalar')
  reference = jobs.load(stage, reference_path, scorer.reference, 'language')

  size, found = s.normalizer.batch, []
  for rows, real in track(stage.name, chunks(len(pairs), size), -(-len(pairs) // size)):
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
  stage.say(
    f'{kind}: Mean(p) = {values["w_mean"]:.4f} ln p {values["b_mean"]:+.4f}, '
    f'Std(p) = {values["w_std"]:.4f} ln p {values["b_std"]:+.4f}'
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
  return _fit_regression(jnp.asarray(position), jnp.asarray(score), mask)
