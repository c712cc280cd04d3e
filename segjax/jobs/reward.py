"""The segment reward model: preference pairs to a scalar at the end of every segment."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.config.settings import Segmentation, Settings
from segjax.data.batches import Pairs, batch_indices, eval_batches, select, split_holdout
from segjax.data.tokenize import tokenize_pairs
from segjax.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from segjax.errors import UserError
from segjax.hf.writer import save_checkpoint
from segjax.jobs import reward_calibration, reward_entropy_cache
from segjax.jobs.job import COMMON, POLICY, REFERENCE, Job, data
from segjax.plan import programs
from segjax.report.console import table, track
from segjax.rl.pair_metrics import pair_metrics
from segjax.run import inputs, models, provenance, training_loop
from segjax.run.stage import Stage
from segjax.train import reward_spec, throughput
from segjax.train.optimizer import init_state
from segjax.train.reward_scoring import SegmentScorer, evaluate_pairs
from segjax.train.reward_spec import RewardSpec
from segjax.train.reward_step import reward_step
from segjax.train.segmenter import make_segmenter

# Of the metrics; two beside the bar, all in the card's curves.
SHOW = ['reward_model/loss', 'reward_model/accuracy', 'reward_model/segments']
HELD_OUT_FILE = 'held_out.json'  # rows of the data that were never trained on, from 0
_LOOKED_AT = 512  # held-out pairs, at most, while it trains


def run(stage: Stage) -> dict[str, Any]:
  """Trains a reward model from config.policy.path's backbone on the pairs of config.data.path.

  Segments are cut by config.reward.segmentation, where it says so by the entropy of
  config.reference.path. Writes `model/` with segment_reward.json, its normaliser still open, and
  `held_out.json`: the rows of the data, 0-based, that were never trained on.
  """
  s = stage.settings
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  config = models.load_network_config(source, s.runtime, stage.mesh, stage.log, trained=True)
  reward_spec.check_tokenizer(source, reference_path)
  tokenizer = load_tokenizer(str(source), s.data.chat_template)
  scorer = SegmentScorer(
    config,
    models.load_network_config(reference_path, s.runtime, stage.mesh, stage.log),
    make_segmenter(s.reward.segmentation, tokenizer),
  )
  pairs = tokenize_pairs(
    inputs.load_config_rows(s.data),
    tokenizer,
    inputs.length_limits(s.data, config, stage.log),
    inputs.pair_rules(s.compat, ratings=s.reward.rating_margin_coef > 0),
  )
  inputs.log_dataset(pairs, stage.log)
  if s.reward.rating_margin_coef and np.isnan(pairs.rating_gap).all():
    raise UserError(
      f'config.reward.rating_margin_coef={s.reward.rating_margin_coef}, but no '
      'pair of the data has ratings; '
      'set it to 0, or give `chosen_rating` and `rejected_rating`.'
    )
  reference = None
  if scorer.segmenter.needs_entropy:
    reference = models.load_params(
      reference_path, scorer.reference, 'language', s.runtime, stage.mesh
    )
    scorer = with_calibrated_threshold(stage, scorer, reference, tokenizer)
    if s.reward.entropy_cache_dir:
      pairs = reward_entropy_cache.with_entropies(stage, pairs, reference, reference_path, scorer)
      reference = None  # its memory is free for what follows
  kept, held_out = split_holdout(pairs, s.reward.holdout_fraction, s.seed)
  stage.log(f'{len(held_out)} pairs held out by prompt')
  looked_at = select(held_out, np.arange(min(len(held_out), _LOOKED_AT)))
  total = training_loop.count_steps(s.reward, len(kept), 'reward')
  params = models.load_params(
    source, config, 'scalar', s.runtime, stage.mesh, key=stage.key('head'), trained=True
  )

  def step_fn(states, step):
    rows = batch_indices(len(kept), s.reward.batch_size, s.seed, step)
    sides = [side.lengths(rows) for side in (kept.chosen, kept.rejected)]
    lengths = np.stack(sides, axis=1).reshape(-1)
    packing, fill = training_loop.plan_packing_for(s.reward, lengths, group=2)
    state, metrics = reward_step(
      states['reward'],
      reference,
      kept.gather(rows, stage.to_device),
      packing,
      scorer=scorer,
      settings=s.reward,
      total_steps=total,
    )
    work = throughput.update(lengths, config, 'scalar', scorer.reference if reference else None)
    metrics = training_loop.prefix_metrics('reward_model', metrics) | fill | work
    if s.reward.eval_every and (step + 1) % s.reward.eval_every == 0:
      metrics |= training_loop.prefix_metrics(
        'eval', evaluate_held_out(stage, state.params, reference, looked_at, scorer)
      )
    return {'reward': state}, metrics

  states = {'reward': init_state(params, s.reward.optimizer, total)}
  trees = states | ({'reference': reference} if reference else {})
  models.log_memory(trees, stage.mesh, stage.log)
  states, last = training_loop.train(stage, states, step_fn, total, SHOW)
  params = states['reward'].params
  if processes.is_first():
    (stage.directory / HELD_OUT_FILE).write_text(json.dumps(held_out.row.tolist()))
  found = held_out_metrics(stage, params, reference, held_out, scorer)
  held = {f'held_out_{name}': value for name, value in found.items()}
  card = provenance.card(stage, {'loss': last.get('reward_model/loss')} | held, pairs, SHOW)
  save_checkpoint(stage.model_directory, params, config, 'scalar', source=source, card=card)
  if processes.is_first():
    write_reward_spec(stage, source, scorer.segmenter.segmentation)
  return {
    'steps': total,
    'loss': last.get('reward_model/loss'),
    'held_out_pairs': len(held_out),
  } | held


def with_calibrated_threshold(
  stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: Any
) -> SegmentScorer:
  """The scorer with the threshold that config.reward.threshold_search asks for."""
  wanted = stage.settings.reward.threshold_search
  if not wanted.target_segment_length and not wanted.entropy_quantile:
    return scorer
  threshold = reward_calibration.run(stage, scorer, reference, tokenizer)
  segmentation = dataclasses.replace(scorer.segmenter.segmentation, entropy_threshold=threshold)
  return dataclasses.replace(
    scorer, segmenter=dataclasses.replace(scorer.segmenter, segmentation=segmentation)
  )


def write_reward_spec(stage: Stage, source: Path, segmentation: Segmentation) -> None:
  """Puts segment_reward.json beside the new weights."""
  reward_spec.write_spec(
    stage.model_directory,
    RewardSpec(segmentation, normalizer=None, tokenizer_sha256=tokenizer_fingerprint(str(source))),
  )


_LABELS = {
  'accuracy': 'the chosen response scores higher',
  'length_baseline_accuracy': 'the longer response is the chosen one',
  'margin': 'mean lead of the chosen response',
  'loss': 'Bradley-Terry loss, nats',
  'ece': 'expected calibration error',
}


def held_out_metrics(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: SegmentScorer
) -> dict[str, float]:
  """What `rl.pair_metrics` says of the reward model on the held-out pairs, also as a table."""
  values = evaluate_held_out(stage, params, reference, held_out, scorer, 'held-out pairs')
  rows = [(label, f'{values[name]:.3f}') for name, label in _LABELS.items()]
  table(f'{len(held_out)} held-out pairs', ('', ''), rows)
  return values


def evaluate_held_out(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: SegmentScorer, note: str = ''
) -> dict[str, float]:
  """Returns `rl.pair_metrics.pair_metrics` of the pairs; a note labels a progress bar."""
  size, found = stage.settings.reward.batch_size, []
  parts = eval_batches(len(held_out), size)
  if note:
    parts = track(stage.name, parts, -(-len(held_out) // size), note)
  for rows, real in parts:
    score = evaluate_pairs(params, reference, held_out.gather(rows, stage.to_device), scorer=scorer)
    found.append(processes.to_host(score)[:real])
  chosen, rejected = np.concatenate(found).T
  lengths = (
    np.diff(side.offsets).astype(np.int32) for side in (held_out.chosen, held_out.rejected)
  )
  metrics = jax.device_get(jax.jit(pair_metrics)(chosen, rejected, *lengths))
  return {name: float(value) for name, value in metrics.items()}


def _num_steps(settings: Settings, num_rows: int) -> int:
  """Returns the number of steps for the dry run: 0 if it depends on rows that are not local."""
  if not num_rows:
    return settings.reward.max_steps
  return training_loop.count_steps(settings.reward, num_rows, 'reward')


JOB = Job(
  name='reward',
  run=run,
  sections=(*COMMON, 'policy', 'reference', 'reward', 'compat'),
  inputs=(POLICY, REFERENCE, data('pairs')),
  outputs=('model', HELD_OUT_FILE),
  batch_keys=programs.REWARD.batch_keys,
  summary=('held_out_accuracy',),
  num_networks=2,
  tokens_per_step=lambda s: 2 * s.reward.batch_size * s.data.max_length,
  num_steps=_num_steps,
  plan=programs.REWARD,
)
