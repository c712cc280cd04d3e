"""The segment reward model: preference pairs to a scalar at the end of every segment."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.config.settings import Segmentation
from segjax.data.batches import Pairs, batch_indices, chunks, split_holdout, take
from segjax.data.tokenizer import fingerprint
from segjax.hf.writer import save_checkpoint
from segjax.jobs import reward_calibration, reward_entropy_cache
from segjax.report.console import table, track
from segjax.rl.pair_metrics import pair_metrics
from segjax.run import provenance
from segjax.run import stage as jobs
from segjax.run.stage import Stage
from segjax.train import reward_spec, throughput
from segjax.train.optimizer import init_state
from segjax.train.reward_spec import SegmentReward
from segjax.train.reward_step import Scorer, evaluate_pairs, reward_step
from segjax.train.segmenter import cutter_of

# Of the metrics; two beside the bar, all in the card's curves.
SHOW = ['train/loss', 'train/accuracy', 'train/segments']
_LOOKED_AT = 512  # held-out pairs, at most, while it trains


def run(stage: Stage) -> dict[str, Any]:
  """Trains a reward model from config.policy.path's backbone on the pairs of config.data.path.

  Segments are cut by config.reward.segmentation, where it says so by the entropy of
  config.reference.path. Writes `model/` with segment_reward.json, its normaliser still open, and
  `held_out.json`: the rows of the data, 0-based, that were never trained on.
  """
  s = stage.settings
  source = jobs.checkpoint(s.policy.path, 'policy.path')
  reference_path = jobs.checkpoint(s.reference.path, 'reference.path')
  config = jobs.network(stage, source, trained=True)
  reward_spec.check_tokenizer(source, reference_path)
  tokenizer = jobs.tokenizer_of(stage, source)
  scorer = Scorer(
    config, jobs.network(stage, reference_path), cutter_of(s.reward.segmentation, tokenizer)
  )
  pairs = jobs.pairs(stage, tokenizer, config)
  jobs.describe(stage, pairs)
  if s.reward.rating_margin and np.isnan(pairs.rating_gap).all():
    raise ValueError(
      f'config.reward.rating_margin={s.reward.rating_margin}, but no pair of the data has ratings; '
      'set it to 0, or give `chosen_rating` and `rejected_rating`.'
    )
  reference = None
  if scorer.cutter.needs_entropy:
    reference = jobs.load(stage, reference_path, scorer.reference, 'language')
    scorer = calibrated(stage, scorer, reference, tokenizer)
    if s.reward.entropy_cache:
      pairs = reward_entropy_cache.with_entropies(stage, pairs, reference, reference_path, scorer)
      reference = None  # its memory is free for what follows
  kept, held_out = split_holdout(pairs, s.reward.holdout, s.seed)
  stage.say(f'{len(held_out)} pairs held out by prompt')
  looked_at = take(held_out, np.arange(min(len(held_out), _LOOKED_AT)))
  total = jobs.num_steps(s.reward.steps, s.reward.epochs, len(kept), s.reward.batch, 'reward')
  params = jobs.load(stage, source, config, 'scalar', trained=True)

  def step_fn(states, step):
    rows = batch_indices(len(kept), s.reward.batch, s.seed, step)
    sides = [side.lengths(rows) for side in (kept.chosen, kept.rejected)]
    lengths = np.stack(sides, axis=1).reshape(-1)
    packing, fill = jobs.packed(s.reward, lengths, group=2)
    state, metrics = reward_step(
      states['reward'],
      reference,
      kept.gather(rows, stage.place),
      packing,
      scorer=scorer,
      settings=s.reward,
      total_steps=total,
    )
    work = throughput.update(lengths, config, 'scalar', scorer.reference if reference else None)
    metrics = jobs.named('train', metrics) | fill | work
    if s.reward.eval_every and (step + 1) % s.reward.eval_every == 0:
      metrics |= jobs.named('eval', measured(stage, state.params, reference, looked_at, scorer))
    return {'reward': state}, metrics

  states = {'reward': init_state(params, s.reward.optimizer, total)}
  jobs.tell_memory(stage, states | ({'reference': reference} if reference else {}))
  states, last = jobs.train(stage, states, step_fn, total, SHOW)
  params = states['reward'].params
  if processes.is_first():
    (stage.directory / 'held_out.json').write_text(json.dumps(held_out.row.tolist()))
  found = held_out_metrics(stage, params, reference, held_out, scorer)
  held = {f'held_out_{name}': value for name, value in found.items()}
  card = provenance.card(stage, {'loss': last.get('train/loss')} | held, pairs, SHOW)
  save_checkpoint(stage.model_directory, params, config, 'scalar', source=source, card=card)
  if processes.is_first():
    write_meaning(stage, source, scorer.cutter.segmentation)
  return {'steps': total, 'loss': last.get('train/loss'), 'held_out_pairs': len(held_out)} | held


def calibrated(stage: Stage, scorer: Scorer, reference: Any, tokenizer: Any) -> Scorer:
  """The scorer with the threshold that config.reward.calibration asks for."""
  wanted = stage.settings.reward.calibration
  if not wanted.target_segment_length and not wanted.entropy_quantile:
    return scorer
  threshold = reward_calibration.run(stage, scorer, reference, tokenizer)
  segmentation = dataclasses.replace(scorer.cutter.segmentation, entropy_threshold=threshold)
  return dataclasses.replace(
    scorer, cutter=dataclasses.replace(scorer.cutter, segmentation=segmentation)
  )


def write_meaning(stage: Stage, source: Path, segmentation: Segmentation) -> None:
  """Puts segment_reward.json beside the new weights."""
  reward_spec.write(
    stage.model_directory,
    SegmentReward(segmentation, normalizer=None, tokenizer_sha256=fingerprint(str(source))),
  )


_LABELS = {
  'accuracy': 'the chosen response scores higher',
  'longer_wins': 'the longer response is the chosen one',
  'margin': 'mean lead of the chosen response',
  'loss': 'Bradley-Terry loss, nats',
  'calibration_error': 'expected calibration error',
}


def held_out_metrics(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: Scorer
) -> dict[str, float]:
  """What `rl.pair_metrics` says of the reward model on the held-out pairs, also as a table."""
  values = measured(stage, params, reference, held_out, scorer, 'held-out pairs')
  rows = [(label, f'{values[name]:.3f}') for name, label in _LABELS.items()]
  table(f'{len(held_out)} held-out pairs', ('', ''), rows)
  return values


def measured(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: Scorer, note: str = ''
) -> dict[str, float]:
  """Returns `rl.pair_metrics.pair_metrics` of the pairs; a note labels a progress bar."""
  size, found = stage.settings.reward.batch, []
  parts = chunks(len(held_out), size)
  if note:
    parts = track(stage.name, parts, -(-len(held_out) // size), note)
  for rows, real in parts:
    score = evaluate_pairs(params, reference, held_out.gather(rows, stage.place), scorer=scorer)
    found.append(processes.fetch(score)[:real])
  chosen, rejected = np.concatenate(found).T
  lengths = (
    np.diff(side.offsets).astype(np.int32) for side in (held_out.chosen, held_out.rejected)
  )
  metrics = jax.device_get(jax.jit(pair_metrics)(chosen, rejected, *lengths))
  return {name: float(value) for name, value in metrics.items()}
