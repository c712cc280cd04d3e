"""Trains the segment reward model: a scalar at the end of every segment, from preference pairs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax import processes
from segjax.config.settings import Segmentation, Settings
from segjax.data.batches import Pairs, batch_indices, eval_batches, select, split_holdout
from segjax.data.tokenize import tokenize_pairs
from segjax.data.tokenizer import ChatTokenizer
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.errors import UserError
from segjax.evaluation.intervals import wilson
from segjax.evaluation.pair_scores import score_pairs, scored_pair_metrics
from segjax.hf.adapter_config import tokenizer_directory
from segjax.jobs import reward_calibration, reward_entropy_cache
from segjax.jobs.job import COMMON, POLICY, REFERENCE, Job, data_input
from segjax.model.llama import LlamaConfig
from segjax.plan import programs
from segjax.report.console import table
from segjax.report.timing import time_evaluation
from segjax.run import inputs, models, provenance, training_loop
from segjax.run.scorers import make_scorer
from segjax.run.stage import Stage
from segjax.run.weights import Weights, log_memory, save_network
from segjax.storage import write_text_atomically
from segjax.train import reward_spec, throughput
from segjax.train.optimizer import init_state
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.reward_spec import RewardSpec
from segjax.train.reward_step import FrozenParams, reward_step

# Printed on the console, the first two next to the progress bar; curves of the model card.
SHOW = ('reward_model/loss', 'reward_model/accuracy', 'reward_model/segments')
HELD_OUT_FILE = 'held_out.json'  # rows of the data that were never trained on, from 0
_MAX_EVAL_PAIRS = 512  # held-out pairs of an evaluation during training

_LABELS = {
  'accuracy': 'the chosen response scores higher',
  'length_baseline_accuracy': 'the longer response is the chosen one',
  'margin': 'mean score of the chosen less that of the rejected response',
  'loss': 'Bradley-Terry loss, nats',
  'ece': 'expected calibration error',
}


class Loaded(NamedTuple):
  """Directories of backbone and reference, tokenizer, how pairs are scored, the pairs."""

  source: Path
  reference_path: Path
  tokenizer: ChatTokenizer
  scorer: SegmentScorer
  pairs: Pairs


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  if s.reward.entropy_cache_dir != 'run':
    inputs.check_creatable('config.reward.entropy_cache_dir', s.reward.entropy_cache_dir)
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  config = models.load_trained_config(stage, 'reward', source)
  reward_spec.check_tokenizer(source, reference_path)
  tokenizer = inputs.load_chat_tokenizer(source, s.data)
  scorer = make_scorer(
    config,
    reference_path,
    s.reward.segmentation,
    tokenizer,
    s.runtime,
    stage.mesh,
    stage.log,
  )
  inputs.log_other_template(tokenizer, reference_path, s.data, stage.log)
  tokenizer = tokenizer.for_networks(scorer.networks)
  return Loaded(source, reference_path, tokenizer, scorer, _load_pairs(stage, tokenizer, config))


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Trains a reward model from config.policy.path's backbone on the pairs of config.data.path.

  Responses are segmented by config.reward.segmentation, with the entropies or log-probs of
  config.reference.path if it reads any. Writes `model/` with segment_reward.json, which has no
  normaliser yet, and `held_out.json`.

  Returns:
    steps, loss, held_out_pairs, and held_out_NAME for each of `rl.preference_metrics`.
  """
  s = stage.settings
  source, reference_path, tokenizer, scorer, pairs = loaded
  config = scorer.reward
  if s.reward.rating_margin_coef > 0 and np.isnan(pairs.rating_gap).all():
    raise UserError(
      f'config.reward.rating_margin_coef={s.reward.rating_margin_coef}, but no pair has '
      'ratings; set it to 0, or provide `chosen_rating` and `rejected_rating`.'
    )
  weights, reference = Weights(s.runtime, stage.mesh), None
  if scorer.segmenter.needs_reference:
    reference = weights.frozen(reference_path, scorer.reference, 'language')
    scorer = with_calibrated_threshold(stage, scorer, reference, tokenizer)
    if s.reward.entropy_cache_dir:
      pairs = reward_entropy_cache.with_ref_signals(stage, pairs, reference, reference_path, scorer)
      reference = None
      weights.forget()  # frees its memory for training
  train_set, held_out = split_holdout(pairs, s.reward.holdout_fraction, s.seed)
  stage.log(f'{len(held_out)} pairs held out by prompt')
  num_steps = training_loop.count_steps(s.reward, len(train_set), 'reward')
  network = weights.trained(source, config, 'scalar', stage.key('head'))
  stage.log(f'training {network.describe()}')
  states = {
    'reward': init_state(network.params, s.reward.optimizer, num_steps, stage.key('rounding'))
  }
  trees = {'reference': reference, 'base': network.base}
  log_memory(states | trees, stage.mesh, stage.log)
  eval_subset = select(held_out, np.arange(min(len(held_out), _MAX_EVAL_PAIRS)))
  frozen = FrozenParams(reference, network.base)
  trainer = Trainer(stage, scorer, frozen, train_set, eval_subset, num_steps)
  states, last = training_loop.train(stage, states, trainer.step, num_steps, SHOW)
  trained = states['reward'].params
  params = network.base | trained
  if processes.is_first():
    write_text_atomically(stage.directory / HELD_OUT_FILE, json.dumps(held_out.row.tolist()))
  metrics = _evaluate_held_out(stage, params, reference, held_out, scorer)
  results = {'loss': last.get('reward_model/loss')} | metrics
  card = provenance.card(stage, results, pairs, SHOW)
  save_network(
    stage.model_directory, trained, config, 'scalar', source=source, card=card, tokenizer=tokenizer
  )
  if processes.is_first():
    _write_reward_spec(stage.model_directory, source, scorer.segmenter.segmentation)
  return {'steps': num_steps, 'held_out_pairs': len(held_out)} | results


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The steps of reward training.

  Attributes:
    frozen: parameters of the base, and of the reference if boundaries read it and no cache does.
    eval_subset: held-out pairs for eval/*.
    num_steps: of the learning rate's schedule.
  """

  stage: Stage
  scorer: SegmentScorer
  frozen: FrozenParams
  train_set: Pairs
  eval_subset: Pairs
  num_steps: int

  def step(
    self, states: training_loop.TrainStates, step: int
  ) -> tuple[training_loop.TrainStates, dict[str, Any]]:
    """Updates the reward model on a batch of pairs."""
    s, pairs = self.stage.settings, self.train_set
    rows = batch_indices(len(pairs), s.reward.batch_size, s.seed, step)
    sides = [side.lengths[rows] for side in (pairs.chosen, pairs.rejected)]
    lengths = np.stack(sides, axis=1).reshape(-1)
    packing, efficiency = training_loop.plan_packing_for(
      s.reward, lengths, self.stage.mesh, self.scorer.reward, group=2
    )
    state, metrics = reward_step(
      states['reward'],
      self.frozen,
      self.stage.gather(pairs, rows),
      packing,
      scorer=self.scorer,
      settings=s.reward,
      total_steps=self.num_steps,
    )
    reference = self.scorer.reference if self.frozen.reference else None
    metrics = training_loop.prefix_metrics('reward_model', metrics) | efficiency
    metrics |= throughput.update(lengths, self.scorer.reward, 'scalar', reference)
    if s.reward.eval_every and (step + 1) % s.reward.eval_every == 0:
      params = self.frozen.base | state.params
      metrics |= time_evaluation(lambda: self._evaluate(params), step=metrics)
    return {'reward': state}, metrics

  def _evaluate(self, params: Any) -> dict[str, float]:
    batches = eval_batches(len(self.eval_subset), self.stage.settings.reward.batch_size)
    scored = score_pairs(
      params, self.frozen.reference, self.eval_subset, self.scorer, batches, self.stage.gather
    )
    return training_loop.prefix_metrics('eval', scored_pair_metrics(scored))


def with_calibrated_threshold(
  stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer
) -> SegmentScorer:
  """Returns the scorer with the threshold of config.reward.threshold_search, if it is on."""
  search = stage.settings.reward.threshold_search
  if not search.target_segment_length and not search.entropy_quantile:
    return scorer
  threshold = reward_calibration.run(stage, scorer, reference, tokenizer)
  segmentation = dataclasses.replace(scorer.segmenter.segmentation, entropy_threshold=threshold)
  segmenter = dataclasses.replace(scorer.segmenter, segmentation=segmentation)
  return dataclasses.replace(scorer, segmenter=segmenter)


def _load_pairs(stage: Stage, tokenizer: ChatTokenizer, config: LlamaConfig) -> Pairs:
  s = stage.settings
  pairs = tokenize_pairs(
    inputs.load_config_rows(s.data, stage.log),
    tokenizer,
    inputs.length_limits(s.data, config, stage.log),
    inputs.pair_rules(s.compat, ratings=s.reward.rating_margin_coef > 0),
  )
  inputs.log_dataset(pairs, stage.log)
  return pairs


def _evaluate_held_out(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: SegmentScorer
) -> dict[str, float]:
  """Prints a table of the metrics of all held-out pairs; returns them as held_out_NAME."""
  size = stage.settings.reward.batch_size
  batches = inputs.tracked_batches(stage.name, len(held_out), size, 'held-out pairs')
  scored = score_pairs(params, reference, held_out, scorer, batches, stage.gather)
  metrics = scored_pair_metrics(scored)
  rows = [(label, f'{metrics[name]:.3f}') for name, label in _LABELS.items()]
  table(f'{len(held_out)} held-out pairs', ('', ''), rows)
  return {f'held_out_{name}': value for name, value in metrics.items()}


def _write_reward_spec(directory: Path, source: Path, segmentation: Segmentation) -> None:
  fingerprint = tokenizer_fingerprint(str(tokenizer_directory(source)))
  spec = RewardSpec(segmentation, normalizer=None, tokenizer_sha256=fingerprint)
  reward_spec.write_spec(directory, spec)


def _headline(stage: Stage, results: dict[str, Any]) -> str:
  share, total = results['held_out_accuracy'], results['held_out_pairs']
  low, high = wilson(share * total, total)
  return (
    f'the chosen response scores higher in {share:.1%} of {total:,} held-out pairs, 95 % interval '
    f'[{low:.1%}, {high:.1%}]'
  )


def _num_steps(settings: Settings, rows: int) -> int:
  held_out = math.ceil(settings.reward.holdout_fraction * rows)  # at least: prompts stay whole
  return training_loop.count_known_steps(settings.reward, rows - held_out, 'reward')


JOB = Job(
  name='reward',
  load=load,
  run=run,
  sections=(*COMMON, 'policy', 'reference', 'lora', 'reward', 'compat'),
  inputs=(POLICY, REFERENCE, data_input('pairs')),
  functions=lambda s: ('reward.segmentation.boundary_fn',),
  outputs=('model', HELD_OUT_FILE),
  batch_keys=programs.REWARD.batch_keys,
  summary=('held_out_accuracy',),
  num_networks=lambda s: 2,
  tokens_per_step=lambda s: 2 * s.reward.batch_size * s.data.max_length,
  num_steps=_num_steps,
  passes=lambda s: 4.0,  # an update, and the reference
  headline=_headline,
  plan=programs.REWARD,
)
