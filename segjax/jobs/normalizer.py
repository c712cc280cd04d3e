"""The normaliser of a reward model's segment scores, by position or constant."""

import dataclasses
import functools
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.conflicts import check_normalizer
from segjax.config.settings import Settings
from segjax.data.batches import Pairs, batch_indices, eval_batches, select
from segjax.data.tokenize import tokenize_pairs
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.jobs.job import COMMON, REFERENCE, REWARD_MODEL, Job, data
from segjax.report.console import track
from segjax.rl import normalizer
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.train import reward_spec
from segjax.train.reward_scoring import SegmentScorer, segment_statistics
from segjax.train.segmenter import make_segmenter
from segjax.types import Normalizer


class Statistics(NamedTuple):
  """Scores of all segments with their relative position, [N], and of the responses, [R]."""

  position: np.ndarray
  score: np.ndarray
  whole: np.ndarray


def run(stage: Stage) -> dict[str, Any]:
  """Fits the normaliser of config.reward_model.path on pairs; stores it in segment_reward.json."""
  s = stage.settings
  source = inputs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
  if not os.access(source, os.W_OK):
    raise UserError(
      f'config.reward_model.path: {source} cannot be written to, and the normaliser belongs there; '
      'copy the reward model to a directory of yours.'
    )
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  stored = reward_spec.read_spec(source)
  named = dataclasses.replace(s.reward_model, normalizer='none')
  meaning = reward_spec.resolve_spec(named, source, reference_path)
  kind = resolve_kind(s.normalizer.kind, meaning.segmentation.granularity)
  config = models.load_network_configs({'reward': source}, s.runtime, stage.mesh, stage.log)[
    'reward'
  ]
  tokenizer = load_tokenizer(str(reference_path), s.data.chat_template)
  scorer = SegmentScorer(
    config,
    models.load_network_config(reference_path, s.runtime, stage.mesh, stage.log),
    make_segmenter(meaning.segmentation, tokenizer),
  )
  pairs = tokenize_pairs(
    inputs.load_config_rows(s.data),
    tokenizer,
    inputs.length_limits(s.data, config, stage.log),
    inputs.pair_rules(s.compat),
  )
  if len(pairs) > s.normalizer.max_pairs:
    pairs = select(pairs, batch_indices(len(pairs), s.normalizer.max_pairs, s.seed, 0))
  inputs.log_dataset(pairs, stage.log)
  params = models.load_params(source, config, 'scalar', s.runtime, stage.mesh)
  reference = None
  if scorer.segmenter.needs_entropy:
    reference = models.load_params(
      reference_path, scorer.reference, 'language', s.runtime, stage.mesh
    )
  found = statistics(stage, params, reference, pairs, scorer)
  options = {
    'weighting': s.normalizer.weighting,
    'min_count': s.normalizer.min_bin_count,
    'first_bin': 0 if s.compat.keep_zero_bin else 1,
  }
  fitted = fit(kind, found, **options)
  filled = dataclasses.replace(
    stored or meaning,
    segmentation=meaning.segmentation,
    normalizer=fitted,
    normalizer_kind=kind,
  )
  processes.barrier('normalizer')  # all have read what the first now replaces
  if processes.is_first():
    reward_spec.write_spec(source, filled)
    write_bins(stage, found, fitted)
  values = {name: float(value) for name, value in vars(fitted).items()}
  stage.log(
    f'{kind}: Mean(p) = {values["w_mean"]:.4f} ln p {values["b_mean"]:+.4f}, '
    f'Std(p) = {values["w_std"]:.4f} ln p {values["b_std"]:+.4f}'
  )
  if kind == 'regression':
    values |= fit_quality(stage, found, fitted, **options)
  return {'kind': kind, 'segments': len(found.score)} | values


def write_bins(stage: Stage, found: Statistics, fitted: Normalizer) -> None:
  """Writes `normalizer.json`: the fit, and the scores' moments in each bin of p that has any."""
  count, mean, std = map(np.asarray, jax.jit(normalizer.bin_moments)(*_arrays(found)))
  used = np.flatnonzero(count)
  bins = {
    'p': (used / (len(count) - 1)).tolist(),
    'count': count[used].tolist(),
    'mean': mean[used].tolist(),
    'std': std[used].tolist(),
  }
  coefficients = {name: float(value) for name, value in vars(fitted).items()}
  stage.directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps({'coefficients': coefficients, 'bins': bins})
  (stage.directory / 'normalizer.json').write_text(text + '\n', encoding='utf-8')


def resolve_kind(kind: str, granularity: str) -> str:
  """The kind of config.normalizer.kind for that granularity, 'auto' resolved."""
  check_normalizer(kind, granularity, 'config.normalizer.kind')
  if kind == 'auto':
    return 'scalar' if granularity == 'bandit' else 'regression'
  return kind


def statistics(
  stage: Stage, params: Any, reference: Any, pairs: Pairs, scorer: SegmentScorer
) -> Statistics:
  """Scores of both sides of the pairs; responses without a segment are left out."""
  size, found = stage.settings.normalizer.batch_size, []
  for rows, real in track(stage.name, eval_batches(len(pairs), size), -(-len(pairs) // size)):
    batch = pairs.gather(rows, stage.to_device)
    arrays = processes.to_host(segment_statistics(params, reference, batch, scorer=scorer))
    position, score, end, whole = (x[: 2 * real] for x in arrays)
    found.append(Statistics(position[end], score[end], whole[end.any(axis=1)]))
  return Statistics(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def fit(kind: str, found: Statistics, **options: Any) -> Normalizer:
  """The normaliser of that kind; `options` are those of `rl.normalizer.fit_regression`."""
  if kind == 'none':
    return Normalizer()
  if not len(found.score):
    raise UserError('the normaliser has no segment to fit: no response of the data has one.')
  if kind == 'regression':
    fit_regression = jax.jit(functools.partial(normalizer.fit_regression, **options))
    return fit_regression(*_arrays(found))
  scores = {
    'global': found.score,
    'last': found.score[found.position == 1],
    'scalar': found.whole,
  }[kind]
  return normalizer.fit_constant(jnp.asarray(scores), jnp.ones(len(scores), bool))


def fit_quality(
  stage: Stage, found: Statistics, fitted: Normalizer, **options: Any
) -> dict[str, float]:
  """How well Mean(p) and Std(p) describe the bins; said, and returned."""
  measure = jax.jit(functools.partial(normalizer.fit_quality, **options))
  values = {k: float(v) for k, v in measure(*_arrays(found), fitted)._asdict().items()}
  stage.log(
    f'{values["num_bins"]:.0f} positions: R² {values["r2_mean"]:.3f} and {values["r2_std"]:.3f}, '
    f'residuals {values["rms_mean"]:.2g} and {values["rms_std"]:.2g} (mean and std)'
  )
  return values


def _arrays(found: Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
  mask = jnp.ones(len(found.score), bool)
  return jnp.asarray(found.position), jnp.asarray(found.score), mask


def _num_steps(settings: Settings, rows: int) -> int:
  pairs = min(settings.normalizer.max_pairs, rows or settings.normalizer.max_pairs)
  return -(-pairs // settings.normalizer.batch_size)


JOB = Job(
  name='normalizer',
  run=run,
  sections=(*COMMON, 'reference', 'reward_model', 'normalizer', 'compat'),
  inputs=(REWARD_MODEL, REFERENCE, data('pairs')),
  rewrites=('reward_model.path', reward_spec.REWARD_SPEC_FILE),
  batch_keys=('normalizer.batch_size',),
  summary=('segments',),
  num_networks=2,
  tokens_per_step=lambda s: 2 * s.normalizer.batch_size * s.data.max_length,
  num_steps=_num_steps,
)
