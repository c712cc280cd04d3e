"""Evaluates a reward model against human judgements: preferences, and annotated errors."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax import processes
from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import Settings
from segjax.data.batches import Pairs
from segjax.data.limits import describe_counts
from segjax.data.source_list import parse_sources
from segjax.data.sources import Rows, load_rows
from segjax.data.span_annotations import TokenizedSpans, tokenize_spans
from segjax.data.tokenize import tokenize_pairs
from segjax.evaluation import span_auc
from segjax.evaluation.intervals import format_interval
from segjax.evaluation.pair_scores import pair_figures, score_pairs
from segjax.jobs.job import (
  COMMON,
  REFERENCE,
  REWARD_MODEL,
  Input,
  Job,
  data_input,
  never,
)
from segjax.report.console import table
from segjax.run import inputs
from segjax.run.scorers import LoadedRewardModel, load_reward_model
from segjax.run.stage import Stage
from segjax.run.text_model import pair_prompt
from segjax.run.weights import Weights
from segjax.storage import write_text_atomically
from segjax.train import reward_spec
from segjax.train.reward_scoring import segment_rewards


class EvaluationData(NamedTuple):
  """Pairs and rows of each file, subset of each pair, responses with spans, counts by file."""

  pairs: list[tuple[Pairs, Rows]]
  subsets: list[str]
  spans: list[TokenizedSpans]
  counts: dict[str, dict[str, int]]


def load(stage: Stage) -> tuple[LoadedRewardModel, EvaluationData]:
  """Loads all but weights."""
  model = load_model(stage.settings, stage.mesh, stage.log)
  return model, load_data(stage.settings, model, stage.log)


def run(stage: Stage, loaded: tuple[LoadedRewardModel, EvaluationData]) -> dict[str, Any]:
  """Evaluates config.reward_model on config.evaluate_reward.pairs and .spans, or config.data.path.

  Text is segmented and scored as in training, by segment_reward.json next to the weights.

  Returns:
    The figures, also written to `results.json`: `pairs` (`pair_figures`), `counts` by file,
    `spans` (`span_auc.figures`), and whether the spans' rewards are `normalized`.

  Raises:
    UserError: boundaries read the reference and config.reference.path is empty, or a file cannot be
      read; both before weights are loaded.
  """
  s = stage.settings
  model, data = loaded
  params, reference = model.load_params(Weights(s.runtime, stage.mesh))
  figures = {
    'pairs_read': sum(len(pairs) for pairs, _ in data.pairs),
    'responses_read': len(data.spans),
    'counts': data.counts,
  }
  if data.pairs:
    scored = [
      score_pairs(
        params,
        reference,
        pairs,
        model.scorer,
        inputs.tracked_batches(stage.name, len(pairs), s.evaluate_reward.batch_size, 'pairs'),
        model.gather(stage, rows, params, reference),
      )
      for pairs, rows in data.pairs
    ]
    figures['pairs'] = pair_figures(
      np.concatenate(scored),
      data.subsets,
      np.concatenate([pairs.truncated for pairs, _ in data.pairs]),
    )
  if data.spans:
    figures['spans'] = _span_figures(stage, model, params, reference, data.spans)
  if processes.is_first():
    record = json.dumps(figures, indent=2) + '\n'
    write_text_atomically(stage.directory / 'results.json', record)
  return figures


def _span_figures(
  stage: Stage,
  model: LoadedRewardModel,
  params: Any,
  reference: Any,
  spans: list[TokenizedSpans],
) -> dict[str, Any]:
  """Returns `span_auc.figures` of the responses, and whether their rewards are `normalized`."""
  s = stage.settings
  score = functools.partial(
    segment_rewards,
    params,
    reference,
    normalizer=jax.tree.map(jnp.float32, model.spec.normalizer),
    scorer=model.scorer,
    std_floor_ratio=resolve_std_floor_ratio(s.reward_shaping),
  )
  size = s.evaluate_reward.batch_size
  rewards = span_auc.segment_rewards_by_token(
    spans,
    score,
    model.smallest.max_position_embeddings,
    inputs.tracked_batches(stage.name, len(spans), size, 'responses with spans'),
    stage.to_device,
    model.text and functools.partial(model.text.add_scores, params, reference),
  )
  is_normalized = model.spec.normalizer_kind != 'none'
  return span_auc.figures(spans, rewards, s.seed) | {'normalized': is_normalized}


def load_data(
  settings: Settings, model: LoadedRewardModel, log: Callable[[str], None]
) -> EvaluationData:
  """Reads and tokenises the files to evaluate on, and logs what was truncated and dropped.

  Weights of sources are ignored: each pair is judged once.
  """
  s, pairs_by_file, subsets, spans, counts = settings, [], [], [], {}
  paths = [source.path for source in parse_sources(s.evaluate_reward.pairs or s.data.path)]
  for path in paths:
    rows = inputs.load_config_rows(dataclasses.replace(s.data, path=path), log)
    limits = inputs.length_limits(s.data, model.smallest, log)
    pairs = tokenize_pairs(rows, model.tokenizer, limits, inputs.pair_rules(s.compat))
    log(f'{path}: {describe_counts(pairs.counts)}, {len(pairs)} pairs judged')
    model.check_prompts(pair_prompt(rows, pairs, i) for i in range(len(pairs)))
    pairs_by_file.append((pairs, rows))
    subsets += [subset_name(rows, int(row)) for row in pairs.row]
    counts[path] = pairs.counts
  if path := s.evaluate_reward.spans:
    rows = load_rows(path, s.data.split, s.data.max_rows)
    limits = inputs.length_limits(s.data, model.smallest, log)
    spans, counts[path] = tokenize_spans(rows, model.tokenizer, limits)
    log(f'{path}: {describe_counts(counts[path])}, {len(spans)} responses judged')
    model.check_prompts((path, response.prompt) for response in spans)
  return EvaluationData(pairs_by_file, subsets, spans, counts)


def load_model(settings: Settings, mesh: Mesh, log: Callable[[str], None]) -> LoadedRewardModel:
  """Resolves config.reward_model, and config.reference where it is needed; loads no weights."""
  overrides = settings.reward_model
  path = inputs.resolve_checkpoint(overrides.path, 'reward_model.path')
  stored = reward_spec.read_spec(path)
  if not overrides.normalizer and (stored is None or stored.normalizer is None):
    overrides = dataclasses.replace(overrides, normalizer='none')  # pairs need none
    if settings.evaluate_reward.spans:
      log('no normaliser has been fitted: spans are ranked by raw scores')
  reference = None
  if settings.reference.path:
    reference = inputs.resolve_checkpoint(settings.reference.path, 'reference.path')
  return load_reward_model(settings, overrides, path, reference, mesh, log)


def subset_name(rows: Rows, index: int) -> str:
  """Returns the subset of a pair: its `subset`, as in RewardBench, its `source`, or its file."""
  row = rows[index]
  return str(row.get('subset') or row.get('source') or rows.name)


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures of `run` as tables."""
  if 'pairs' in figures:
    _print_pairs(figures['pairs'])
  if 'spans' in figures:
    _print_spans(figures['spans'])


def _print_pairs(figures: dict[str, Any]) -> None:
  groups = {**figures['subsets'], 'all': figures['all']}
  if figures['untruncated'] and figures['truncated']:
    groups['not truncated'] = figures['untruncated']
  rows = [
    (
      name[:27],
      str(values['accuracy']['n']),
      format_interval(values['accuracy']),
      *(f'{values[key]:.3f}' for key in ('length_baseline_accuracy', 'margin', 'ece')),
    )
    for name, values in groups.items()
  ]
  columns = ('', 'pairs', 'accuracy [95 %]', 'longer wins', 'margin', 'ECE')
  table('Pairs: how often the preferred response scores higher', columns, rows)
  if sections := figures['reward_bench']:
    rows = [(name, f'{value:.3f}') for name, value in sections.items()]
    table('RewardBench', ('section', 'accuracy'), rows)


def _print_spans(figures: dict[str, Any]) -> None:
  groups = {'all types': figures, **figures['types']}
  rows = [
    (
      name[:30],
      str(values['spans']),
      format_interval(values['auc']),
      format_interval(values['auc_within']),
    )
    for name, values in groups.items()
  ]
  columns = ('', 'spans', 'AUC [95 %]', 'within a response')
  table('Marked errors: do low segment rewards find their characters?', columns, rows)


def _needs_data(settings: Settings) -> bool:
  return not (settings.evaluate_reward.pairs or settings.evaluate_reward.spans)


JOB = Job(
  name='evaluate_reward',
  load=load,
  run=run,
  sections=(*COMMON, 'reference', 'reward_model', 'reward_shaping', 'compat', 'evaluate_reward'),
  inputs=(
    REWARD_MODEL,
    data_input('pairs', is_required=_needs_data),
    dataclasses.replace(REFERENCE, is_required=never),
    Input('evaluate_reward.pairs', is_required=never, is_list=True, is_rows=True),
    Input('evaluate_reward.spans', is_required=never, is_rows=True),
  ),
  functions=lambda s: ('reward_model.segmentation.boundary_fn',),
  outputs=('results.json',),
  batch_keys=('evaluate_reward.batch_size',),
  summary=('pairs_read', 'responses_read'),
  print_table=print_table,
  num_networks=lambda s: 2,
)
