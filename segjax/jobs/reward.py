"""The segment reward model: preference pairs to a scalar at the end of every segment."""

import json
from typing import Any

import jax
import numpy as np

from segjax.data.batches import Pairs, batch_indices, chunks, split_holdout
from segjax.data.encoding import encode_pairs
from segjax.data.tokenizer import fingerprint
from segjax.hf.writer import save_checkpoint
from segjax.jobs import stage as jobs
from segjax.jobs.stage import Stage
from segjax.report.console import track
from segjax.train import segment_reward
from segjax.train.optimizer import init_state
from segjax.train.reward_step import Scorer, evaluate_pairs, reward_step
from segjax.train.segment_reward import SegmentReward


def run(stage: Stage) -> dict[str, Any]:
  """Trains a reward model from config.policy.path's backbone on the pairs of config.data.path.

  Segments are cut by the entropy of config.reference.path. Writes `model/` with
  segment_reward.json, its normaliser still open, and `held_out.json`: the rows of the data,
  0-based, that were never trained on.
  """
  s = stage.settings
  source = jobs.checkpoint(s.policy.path, 'policy.path')
  reference_path = jobs.checkpoint(s.reference.path, 'reference.path')
  config = jobs.network(stage, source, trained=True)
  segment_reward.check_tokenizer(source, reference_path)
  scorer = Scorer(
    config,
    jobs.network(stage, reference_path),
    s.reward.granularity,
    s.reward.entropy_threshold,
  )
  tokenizer = jobs.tokenizer_of(stage, source)
  pairs = encode_pairs(jobs.rows(stage), tokenizer, jobs.limits(stage, config))
  jobs.describe(stage, pairs)
  kept, held_out = split_holdout(pairs, s.reward.holdout, s.seed)
  stage.say(f'{len(held_out)} pairs held out by prompt')
  total = jobs.num_steps(s.reward.steps, s.reward.epochs, len(kept), s.reward.batch, 'reward')
  reference = jobs.load(stage, reference_path, scorer.reference, 'language')
  params = jobs.load(stage, source, config, 'scalar', trained=True)

  def step_fn(states, step):
    rows = batch_indices(len(kept), s.reward.batch, s.seed, step)
    state, metrics = reward_step(
      states['reward'],
      reference,
      kept.gather(rows, stage.place),
      scorer=scorer,
      margin=s.reward.margin,
      optimizer=s.reward.optimizer,
      total_steps=total,
    )
    return {'reward': state}, metrics

  states = {'reward': init_state(params, s.reward.optimizer, total)}
  states, last = jobs.train(stage, states, step_fn, total, ['loss', 'accuracy', 'segments'])
  params = states['reward'].params
  (stage.directory / 'held_out.json').write_text(json.dumps(held_out.row.tolist()))
  correct = held_out_correct(stage, params, reference, held_out, scorer)
  save_checkpoint(stage.model_directory, params, config, 'scalar', source=source)
  segment_reward.write(
    stage.model_directory,
    SegmentReward(
      s.reward.granularity,
      s.reward.entropy_threshold,
      normalizer=None,
      tokenizer_sha256=fingerprint(str(source)),
    ),
  )
  return {
    'steps': total,
    'loss': last.get('loss'),
    'held_out_accuracy': float(np.mean(correct)),
    'held_out_pairs': len(held_out),
  }


def held_out_correct(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: Scorer
) -> np.ndarray:
  """1 where the chosen response scores higher, 0.5 at a tie, [N]."""
  size, found = stage.settings.reward.batch, []
  total = -(-len(held_out) // size)
  for rows, real in track(stage.name, chunks(len(held_out), size), total, 'held-out pairs'):
    score = evaluate_pairs(params, reference, held_out.gather(rows, stage.place), scorer=scorer)
    found.append(jax.device_get(score)[:real])
  chosen, rejected = np.concatenate(found).T
  return (chosen > rejected) + 0.5 * (chosen == rejected)
