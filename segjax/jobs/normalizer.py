"""Fits the normaliser of a reward model's segment scores: by position, or constant."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.conflicts import check_normalizer
from segjax.config.settings import Settings
from segjax.data.batches import Pairs, batch_indices, select
from segjax.data.rows import Rows
from segjax.data.tokenize import tokenize_pairs
from segjax.errors import UserError
from segjax.jobs.job import COMMON, REFERENCE, REWARD_MODEL, Job, data_input
from segjax.rl import normalizer
from segjax.run import inputs
from segjax.run.scorers import LoadedRewardModel, load_reward_model
from segjax.run.stage import Stage
from segjax.run.text_model import pair_prompt
from segjax.run.weights import Weights
from segjax.storage import make_directory, write_text_atomically
from segjax.train import reward_spec
from segjax.train.reward_scoring import SegmentScorer, segment_statistics
from segjax.train.reward_spec import RewardSpec
from segjax.types import Normalizer, PreferenceBatch

BINS_FILE = 'normalizer.json'


class Statistics(NamedTuple):
  """Scores that a normaliser is fitted to.

  Attributes:
    position: relative position of each segment, [N].
    score: score of each segment, [N].
    response_score: aggregated score of each response, [R].
  """

  position: np.ndarray
  score: np.ndarray
  response_score: np.ndarray


class Loaded(NamedTuple):
  """The reward model, the spec to complete, the pairs and the rows that they come from."""

  model: LoadedRewardModel
  spec: RewardSpec
  pairs: Pairs
  rows: Rows


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  source = inputs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
  if not os.access(source, os.W_OK):
    raise UserError(
      f'config.reward_model.path={str(source)!r} cannot be written to, and the normaliser '
      'is stored there; copy the reward model to a directory of your own.'
    )
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  stored = reward_spec.read_spec(source, with_normalizer=False)
  without_normalizer = dataclasses.replace(s.reward_model, normalizer='none')
  model = load_reward_model(s, without_normalizer, source, reference_path, stage.mesh, stage.log)
  spec = model.spec
  kind = resolve_kind(s.normalizer.kind, spec.segmentation.granularity)
  rows = inputs.load_config_rows(s.data, stage.log)
  pairs = _load_pairs(stage, rows, model)
  new_spec = dataclasses.replace(
    stored or spec, segmentation=spec.segmentation, normalizer_kind=kind
  )
  return Loaded(model, new_spec, pairs, rows)


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Fits the normaliser of config.reward_model.path on pairs; stores it in segment_reward.json.

  Returns:
    kind, segments, the coefficients, and for a regression `rl.normalizer.fit_quality`.
  """
  s = stage.settings
  model, spec, pairs, rows = loaded
  params, reference = model.load_params(Weights(s.runtime, stage.mesh))
  gather = model.gather(stage, rows, params, reference)
  statistics = collect_statistics(stage, params, reference, pairs, model.scorer, gather)
  options = {
    'weighting': s.normalizer.weighting,
    'min_count': s.normalizer.min_bin_count,
    'first_bin': 0 if s.compat.keep_zero_bin else 1,
  }
  kind = spec.normalizer_kind
  fitted = fit(kind, statistics, **options)
  coefficients = {name: float(value) for name, value in vars(fitted).items()}
  processes.barrier('normalizer')  # every process has read the file that the first one replaces
  if processes.is_first():
    reward_spec.write_spec(model.path, dataclasses.replace(spec, normalizer=fitted))
    write_bins(stage.directory, statistics, coefficients)
  stage.log(
    f'{kind}: Mean(p) = {fitted.w_mean:.4f} ln p {fitted.b_mean:+.4f}, '
    f'Std(p) = {fitted.w_std:.4f} ln p {fitted.b_std:+.4f}'
  )
  results = {'kind': kind, 'segments': len(statistics.score)} | coefficients
  if kind == 'regression':
    results |= fit_quality(statistics, fitted, stage.log, **options)
  return results


def _load_pairs(stage: Stage, rows: Rows, model: LoadedRewardModel) -> Pairs:
  """Loads the pairs of config.data, at most config.normalizer.max_pairs, drawn at random."""
  s = stage.settings
  limits = inputs.length_limits(s.data, model.smallest, stage.log)
  pairs = tokenize_pairs(rows, model.tokenizer, limits, inputs.pair_rules(s.compat))
  if len(pairs) > s.normalizer.max_pairs:
    pairs = select(pairs, batch_indices(len(pairs), s.normalizer.max_pairs, s.seed, 0))
  inputs.log_dataset(pairs, stage.log)
  model.check_prompts(pair_prompt(rows, pairs, i) for i in range(len(pairs)))
  return pairs


def write_bins(directory: Path, statistics: Statistics, coefficients: dict[str, float]) -> None:
  """Writes `normalizer.json`: the coefficients, and count, mean and std of each non-empty bin."""
  count, mean, std = map(np.asarray, jax.jit(normalizer.bin_moments)(*_arrays(statistics)))
  used = np.flatnonzero(count)
  bins = {
    'p': (used / (len(count) - 1)).tolist(),
    'count': count[used].tolist(),
    'mean': mean[used].tolist(),
    'std': std[used].tolist(),
  }
  make_directory(directory)
  record = json.dumps({'coefficients': coefficients, 'bins': bins})
  write_text_atomically(directory / BINS_FILE, record + '\n')


def resolve_kind(kind: str, granularity: str) -> str:
  """Returns config.normalizer.kind for a granularity, with 'auto' resolved.

  Raises:
    UserError: the granularity has no normaliser of that kind.
  """
  check_normalizer(kind, granularity, 'config.normalizer.kind')
  if kind == 'auto':
    return 'scalar' if granularity == 'bandit' else 'regression'
  return kind


def collect_statistics(
  stage: Stage,
  params: Any,
  reference: Any,
  pairs: Pairs,
  scorer: SegmentScorer,
  gather: Callable[[Pairs, np.ndarray], PreferenceBatch],
) -> Statistics:
  """Scores both sides of the pairs; responses without a segment are left out."""
  parts = []
  size = stage.settings.normalizer.batch_size
  for rows, num_real in inputs.tracked_batches(stage.name, len(pairs), size):
    batch = gather(pairs, rows)
    arrays = processes.to_host(segment_statistics(params, reference, batch, scorer=scorer))
    # Two sequences per pair; the last batch repeats its last pair to be full.
    position, score, end, response_score = (x[: 2 * num_real] for x in arrays)
    parts.append(Statistics(position[end], score[end], response_score[end.any(axis=1)]))
  return Statistics(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def fit(kind: str, statistics: Statistics, **options: Any) -> Normalizer:
  """Returns the normaliser of that kind.

  Args:
    options: of `rl.normalizer.fit_regression`.

  Raises:
    UserError: there is no segment.
  """
  if kind == 'none':
    return Normalizer()
  if not len(statistics.score):
    raise UserError(
      'config.data has no response with a segment, so the normaliser cannot be fitted; '
      'use other pairs or another segmentation.'
    )
  if kind == 'regression':
    fit_regression = jax.jit(functools.partial(normalizer.fit_regression, **options))
    return fit_regression(*_arrays(statistics))
  scores = {
    'global': statistics.score,
    'last': statistics.score[statistics.position == 1],
    'scalar': statistics.response_score,
  }[kind]
  return normalizer.fit_constant(jnp.asarray(scores), jnp.ones(len(scores), bool))


def fit_quality(
  statistics: Statistics, fitted: Normalizer, log: Callable[[str], None], **options: Any
) -> dict[str, float]:
  """Returns and logs how well Mean(p) and Std(p) describe the bins."""
  measure = jax.jit(functools.partial(normalizer.fit_quality, **options))
  quality = measure(*_arrays(statistics), fitted)._asdict()
  values = {name: float(value) for name, value in quality.items()}
  log(
    f'{values["num_bins"]:.0f} positions: R² {values["r2_mean"]:.3f} and {values["r2_std"]:.3f}, '
    f'residuals {values["rms_mean"]:.2g} and {values["rms_std"]:.2g} (mean and std)'
  )
  return values


def _arrays(statistics: Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
  mask = jnp.ones(len(statistics.score), bool)
  return jnp.asarray(statistics.position), jnp.asarray(statistics.score), mask


def _num_steps(settings: Settings, rows: int) -> int:
  """Returns the number of batches, at most."""
  pairs = min(settings.normalizer.max_pairs, rows or settings.normalizer.max_pairs)
  return -(-pairs // settings.normalizer.batch_size)


JOB = Job(
  name='normalizer',
  load=load,
  run=run,
  sections=(*COMMON, 'reference', 'reward_model', 'normalizer', 'compat'),
  inputs=(REWARD_MODEL, REFERENCE, data_input('pairs')),
  functions=lambda s: ('reward_model.segmentation.boundary_fn',),
  outputs=(BINS_FILE,),
  rewrites=('reward_model.path', reward_spec.REWARD_SPEC_FILE),
  batch_keys=('normalizer.batch_size',),
  summary=('segments',),
  num_networks=lambda s: 2,
  tokens_per_step=lambda s: 2 * s.normalizer.batch_size * s.data.max_length,
  num_steps=_num_steps,
  passes=lambda s: 2.0,
)
