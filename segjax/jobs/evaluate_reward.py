"""A reward model against human judgements: which of two responses, and where in one the errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.data.batches import Pairs, eval_batches
from segjax.data.limits import describe_counts
from segjax.data.sources import Rows, load_rows
from segjax.data.span_annotations import TokenizedSpans, tokenize_spans
from segjax.data.tokenize import tokenize_pairs
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.errors import UserError
from segjax.evaluation import reward_bench, span_auc
from segjax.evaluation.intervals import format_interval, wilson
from segjax.model.llama import LlamaConfig
from segjax.report.console import table, track
from segjax.rl.pair_metrics import pair_metrics
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.train import reward_spec
from segjax.train.reward_spec import RewardSpec
from segjax.train.reward_step import SegmentScorer, evaluate_pairs
from segjax.train.segmenter import make_segmenter


@dataclasses.dataclass(frozen=True)
class LoadedRewardModel:
  """The reward model: where it is, what its scores mean, how it scores.

  Attributes:
    reference: the directory of the model whose entropies cut; None where none is needed.
    shortest: of the networks that read, the one of the fewest positions.
  """

  path: Path
  reference: Path | None
  meaning: RewardSpec
  scorer: SegmentScorer
  tokenizer: ChatTokenizer
  shortest: LlamaConfig


def run(stage: Stage) -> dict[str, Any]:
  """Judges config.evaluate_reward.pairs, or config.data.path, and config.evaluate_reward.spans.

  Everything is cut and scored as in training, by segment_reward.json beside the weights.

  Returns:
    The figures, also written to `results.json`: `pairs` (`pair_figures`), `counts` by file,
    `spans` (`span_evaluation.figures`), and whether the spans' rewards are `normalized`.

  Raises:
    ValueError: segments are cut by entropy and config.reference.path is empty; a file cannot be
      read. Both before a network is loaded.
  """
  judge = load_judge(stage)
  sets, marked, counts = load_inputs(stage, judge)
  params = models.load_params(
    judge.path, judge.scorer.reward, 'scalar', stage.settings.runtime, stage.mesh
  )
  reference = None
  if judge.reference is not None:
    reference = models.load_params(
      judge.reference,
      judge.scorer.reference,
      'language',
      stage.settings.runtime,
      stage.mesh,
    )
  figures = {
    'pairs_read': sum(len(pairs) for pairs, _ in sets),
    'responses_read': len(marked),
    'counts': counts,
  }
  if sets:
    scored = [pair_scores(stage, params, reference, pairs, judge.scorer) for pairs, _ in sets]
    figures['pairs'] = pair_figures(
      np.concatenate(scored),
      [name for _, names in sets for name in names],
      np.concatenate([pairs.truncated for pairs, _ in sets]),
    )
  if marked:
    normalizer = jax.tree.map(jnp.float32, judge.meaning.normalizer)
    rewards = span_auc.segment_rewards_by_token(
      stage, params, reference, marked, judge.scorer, normalizer
    )
    figures['spans'] = span_auc.figures(marked, rewards, stage.settings.seed)
    figures['spans']['normalized'] = judge.meaning.normalizer_kind != 'none'
  if processes.is_first():
    text = json.dumps(figures, indent=2) + '\n'
    (stage.directory / 'results.json').write_text(text, encoding='utf-8')
  return figures


def load_inputs(
  stage: Stage, judge: LoadedRewardModel
) -> tuple[list[tuple[Pairs, list[str]]], list[TokenizedSpans], dict[str, dict[str, int]]]:
  """(pairs of each file with their subsets, marked responses, counts of rows by file)."""
  s = stage.settings
  sets, marked, counts = [], [], {}
  for path in inputs.split_paths(s.evaluate_reward.pairs) or [s.data.path] * bool(s.data.path):
    pairs, rows = read_pairs(stage, judge, path)
    sets.append((pairs, [subset_name(rows, int(row)) for row in pairs.row]))
    counts[path] = pairs.counts
  if path := s.evaluate_reward.spans:
    rows = load_rows(path, s.data.split, s.data.max_rows)
    limits = inputs.length_limits(s.data, judge.shortest, stage.log)
    marked, counts[path] = tokenize_spans(rows, judge.tokenizer, limits)
    stage.log(f'{path}: {describe_counts(counts[path])}, {len(marked)} responses judged')
  return sets, marked, counts


def load_judge(stage: Stage) -> LoadedRewardModel:
  """config.reward_model, and config.reference where it is needed. Loads no weights."""
  s = stage.settings
  path = inputs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
  stored, named = reward_spec.read_spec(path), s.reward_model
  if not named.normalizer and (stored is None or stored.normalizer is None):
    named = dataclasses.replace(named, normalizer='none')  # pairs need none
    if s.evaluate_reward.spans:
      stage.log('no normaliser has been fitted: spans are ranked by raw scores')
  reference = (
    inputs.resolve_checkpoint(s.reference.path, 'reference.path') if s.reference.path else None
  )
  meaning = reward_spec.resolve_spec(named, path, reference or path)
  tokenizer = load_tokenizer(str(path), s.data.chat_template)
  cutter = make_segmenter(meaning.segmentation, tokenizer)
  config = models.load_network_configs({'reward': path}, s.runtime, stage.mesh, stage.log)['reward']
  networks = [config]
  if cutter.needs_entropy:
    if reference is None:
      raise UserError(
        'config.reference.path is empty, and this reward model cuts where the entropy of its '
        'reference is high; give the SFT model that it was trained with.'
      )
    networks.append(models.load_network_config(reference, s.runtime, stage.mesh, stage.log))
  return LoadedRewardModel(
    path=path,
    reference=reference if cutter.needs_entropy else None,
    meaning=meaning,
    scorer=SegmentScorer(config, networks[-1], cutter),
    tokenizer=tokenizer,
    shortest=min(networks, key=lambda network: network.max_position_embeddings),
  )


def read_pairs(stage: Stage, judge: LoadedRewardModel, path: str) -> tuple[Pairs, Rows]:
  """The pairs of one file, cut as in training, and its rows; says what was cut and dropped."""
  s = stage.settings
  rows = load_rows(path, s.data.split, s.data.max_rows)
  limits = inputs.length_limits(s.data, judge.shortest, stage.log)
  pairs = tokenize_pairs(rows, judge.tokenizer, limits, inputs.pair_rules(s.compat))
  stage.log(f'{path}: {describe_counts(pairs.counts)}, {len(pairs)} pairs judged')
  return pairs, rows


def subset_name(rows: Rows, index: int) -> str:
  """What a pair is counted under: its `subset` as RewardBench has it, its `source`, or its file."""
  row = rows[index]
  return str(row.get('subset') or row.get('source') or rows.name)


def pair_scores(
  stage: Stage, params: Any, reference: Any, pairs: Pairs, scorer: SegmentScorer
) -> np.ndarray:
  """(score of chosen, of rejected, length of each in tokens), [N, 4], on the host."""
  size, found = stage.settings.evaluate_reward.batch_size, []
  total = -(-len(pairs) // size)
  for rows, real in track(stage.name, eval_batches(len(pairs), size), total, 'pairs'):
    score = evaluate_pairs(params, reference, pairs.gather(rows, stage.to_device), scorer=scorer)
    found.append(processes.to_host(score)[:real])
  lengths = [np.diff(side.offsets) for side in (pairs.chosen, pairs.rejected)]
  return np.column_stack([np.concatenate(found), *lengths])


def pair_figures(scored: np.ndarray, subsets: list[str], truncated: np.ndarray) -> dict[str, Any]:
  """Figures of all pairs, of those that were not cut, of each subset; RewardBench's sections.

  Args:
    scored: as `pair_scores` gives it.
    subsets: what each pair is counted under.
    truncated: whether it was cut to length.

  Returns:
    `all`, `untruncated` (None if none is), `subsets` by name: `rl.pair_metrics.pair_metrics`,
    where the accuracy has its Wilson interval; `reward_bench`: see `reward_bench.section_scores`.
  """
  names = np.array(subsets)
  by_name = {name: _figures(scored[names == name]) for name in sorted(set(subsets))}
  accuracies = {name: found['accuracy']['mean'] for name, found in by_name.items()}
  return {
    'all': _figures(scored),
    'untruncated': _figures(scored[~truncated]) if not truncated.all() else None,
    'truncated': int(truncated.sum()),
    'subsets': by_name,
    'reward_bench': reward_bench.section_scores(accuracies),
  }


def _figures(scored: np.ndarray) -> dict[str, Any]:
  chosen, rejected = scored[:, :2].T.astype(np.float32)
  lengths = (x.astype(np.int32) for x in scored[:, 2:].T)
  found = pair_metrics(*map(jnp.asarray, (chosen, rejected, *lengths)))
  values = {name: float(value) for name, value in found.items()}
  n = len(scored)
  low, high = wilson(values['accuracy'] * n, n)
  return values | {'accuracy': {'mean': values['accuracy'], 'low': low, 'high': high, 'n': n}}


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures of `run` as tables."""
  if 'pairs' in figures:
    _show_pairs(figures['pairs'])
  if 'spans' in figures:
    _show_spans(figures['spans'])


def _show_pairs(found: dict[str, Any]) -> None:
  groups = {**found['subsets'], 'all': found['all']}
  if found['untruncated'] and found['truncated']:
    groups['all that were not cut'] = found['untruncated']
  rows = [
    (
      name[:27],
      str(one['accuracy']['n']),
      format_interval(one['accuracy']),
      *(f'{one[key]:.3f}' for key in ('length_baseline_accuracy', 'margin', 'ece')),
    )
    for name, one in groups.items()
  ]
  columns = ('', 'pairs', 'accuracy [95 %]', 'longer wins', 'margin', 'ECE')
  table('Pairs: how often the preferred response scores higher', columns, rows)
  if sections := found['reward_bench']:
    rows = [(name, f'{value:.3f}') for name, value in sections.items()]
    table('RewardBench', ('section', 'accuracy'), rows)


def _show_spans(found: dict[str, Any]) -> None:
  groups = {'all types': found, **found['types']}
  rows = [
    (name[:30], str(one['spans']), format_interval(one['auc']), format_interval(one['auc_within']))
    for name, one in groups.items()
  ]
  columns = ('', 'spans', 'AUC [95 %]', 'within a response')
  table('Marked errors: do low segment rewards find their characters?', columns, rows)
