"""Training of a network on preference pairs, as the jobs reward and dpo do it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax import processes
from segjax.config.settings import PairTraining, Settings
from segjax.data.batches import Pairs, batch_indices, eval_batches, select, split_holdout
from segjax.data.tokenize import tokenize_pairs
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation.intervals import wilson
from segjax.evaluation.pair_scores import score_pairs, scored_pair_metrics
from segjax.jobs.job import COMMON, POLICY, REFERENCE, Job, data_input
from segjax.model.llama import LlamaConfig
from segjax.plan.phases import JobPlan
from segjax.report.console import table
from segjax.report.timing import time_evaluation
from segjax.run import inputs, provenance, training_loop
from segjax.run.stage import Stage
from segjax.run.weights import Weights, log_memory, save_network
from segjax.storage import write_text_atomically
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.reward_scoring import PairScorer

HELD_OUT_FILE = 'held_out.json'  # rows of the data that were never trained on, from 0
_MAX_EVAL_PAIRS = 512  # held-out pairs of an evaluation during training

_LABELS = {
  'accuracy': 'the chosen response scores higher',
  'length_baseline_accuracy': 'the longer response is the chosen one',
  'margin': 'mean score of the chosen less that of the rejected response',
  'loss': 'Bradley-Terry loss, nats',
  'ece': 'expected calibration error',
}


class Network(NamedTuple):
  """The network that is trained on pairs.

  Attributes:
    source: directory of its first weights.
    config: the network.
    head: 'language' or 'scalar'.
    tokenizer: that it is trained with.
    group: its metrics are named `group/...`.
  """

  source: Path
  config: LlamaConfig
  head: str
  tokenizer: ChatTokenizer
  group: str


def load_pairs(stage: Stage, network: Network) -> Pairs:
  """Loads and tokenizes the pairs of config.data."""
  s, settings = stage.settings, _settings(stage)
  pairs = tokenize_pairs(
    inputs.load_config_rows(s.data, stage.log),
    network.tokenizer,
    inputs.length_limits(s.data, network.config, stage.log),
    inputs.pair_rules(s.compat, ratings=settings.rating_margin_coef > 0),
  )
  inputs.log_dataset(pairs, stage.log)
  return pairs


def check_ratings(stage: Stage, pairs: Pairs) -> None:
  """Raises UserError if the margin depends on ratings and no pair has any."""
  if _settings(stage).rating_margin_coef > 0 and np.isnan(pairs.rating_gap).all():
    raise UserError(
      f'config.{stage.name}.rating_margin_coef={_settings(stage).rating_margin_coef}, but no pair '
      'has ratings; set it to 0, or provide `chosen_rating` and `rejected_rating`.'
    )


def run(
  stage: Stage, network: Network, scorer: PairScorer, pairs: Pairs, weights: Weights, reference: Any
) -> dict[str, Any]:
  """Trains the network on all pairs but those held out by prompt; writes `model/`.

  Args:
    stage: of the job `reward` or `dpo`, whose section of the settings is read.
    network: the network.
    scorer: how it scores a response.
    pairs: the pairs.
    weights: loads the network.
    reference: parameters of the reference; None where it is not run.

  Returns:
    steps, loss, held_out_pairs, and held_out_NAME for each of `rl.preference_metrics`.
  """
  s, (source, config, head, tokenizer, group) = _settings(stage), network
  train_set, held_out = split_holdout(pairs, s.holdout_fraction, stage.settings.seed)
  stage.log(f'{len(held_out)} pairs held out by prompt')
  num_steps = training_loop.count_steps(s, len(train_set), stage.name)
  key = stage.key('head' if head == 'scalar' else 'adapter')
  trainable = weights.trained(source, config, head, key)
  stage.log(f'training {trainable.describe()}')
  states = {stage.name: init_state(trainable.params, s.optimizer, num_steps, stage.key('rounding'))}
  trees = {'reference': reference, 'base': trainable.base}
  log_memory(states | trees, stage.mesh, stage.log)
  eval_subset = select(held_out, np.arange(min(len(held_out), _MAX_EVAL_PAIRS)))
  frozen = FrozenParams(reference, trainable.base)
  trainer = Trainer(stage, network, scorer, frozen, train_set, eval_subset, num_steps)
  third = 'segments' if group == 'reward_model' else 'chosen_reward'
  show = f'{group}/loss', f'{group}/accuracy', f'{group}/{third}'  # the first two beside the bar
  states, last = training_loop.train(stage, states, trainer.step, num_steps, show)
  params = states[stage.name].params
  if processes.is_first():
    write_text_atomically(stage.directory / HELD_OUT_FILE, json.dumps(held_out.row.tolist()))
  metrics = _evaluate_held_out(stage, trainable.base | params, reference, held_out, scorer)
  results = {'loss': last.get(f'{group}/loss')} | metrics
  card = provenance.card(stage, results, pairs, show)
  save_network(
    stage.model_directory, params, config, head, source=source, card=card, tokenizer=tokenizer
  )
  return {'steps': num_steps, 'held_out_pairs': len(held_out)} | results


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The steps of training on pairs.

  Attributes:
    frozen: parameters of the base, and of the reference where it is run.
    eval_subset: held-out pairs for eval/*.
    num_steps: of the learning rate's schedule.
  """

  stage: Stage
  network: Network
  scorer: PairScorer
  frozen: FrozenParams
  train_set: Pairs
  eval_subset: Pairs
  num_steps: int

  def step(
    self, states: training_loop.TrainStates, step: int
  ) -> tuple[training_loop.TrainStates, dict[str, Any]]:
    """Updates the network on a batch of pairs."""
    stage, s, pairs = self.stage, _settings(self.stage), self.train_set
    rows = batch_indices(len(pairs), s.batch_size, stage.settings.seed, step)
    sides = [side.lengths[rows] for side in (pairs.chosen, pairs.rejected)]
    lengths = np.stack(sides, axis=1).reshape(-1)
    network, head = self.network.config, self.network.head
    packing, efficiency = training_loop.plan_packing_for(s, lengths, stage.mesh, network, group=2)
    state, metrics = preference_step(
      states[stage.name],
      self.frozen,
      stage.gather(pairs, rows),
      packing,
      scorer=self.scorer,
      settings=s,
      total_steps=self.num_steps,
    )
    reference = self.scorer.reference if self.frozen.reference else None
    metrics = training_loop.prefix_metrics(self.network.group, metrics) | efficiency
    metrics |= throughput.update(lengths, network, head, reference)
    if s.eval_every and (step + 1) % s.eval_every == 0:
      params = self.frozen.base | state.params
      metrics |= time_evaluation(lambda: self._evaluate(params), step=metrics)
    return {stage.name: state}, metrics

  def _evaluate(self, params: Any) -> dict[str, float]:
    batches = eval_batches(len(self.eval_subset), _settings(self.stage).batch_size)
    scored = score_pairs(
      params, self.frozen.reference, self.eval_subset, self.scorer, batches, self.stage.gather
    )
    return training_loop.prefix_metrics('eval', scored_pair_metrics(scored))


def _settings(stage: Stage) -> PairTraining:
  """Returns the section of the settings that has the stage's name."""
  return getattr(stage.settings, stage.name)


def _evaluate_held_out(
  stage: Stage, params: Any, reference: Any, held_out: Pairs, scorer: PairScorer
) -> dict[str, float]:
  """Prints a table of the metrics of all held-out pairs; returns them as held_out_NAME."""
  size = _settings(stage).batch_size
  batches = inputs.tracked_batches(stage.name, len(held_out), size, 'held-out pairs')
  scored = score_pairs(params, reference, held_out, scorer, batches, stage.gather)
  metrics = scored_pair_metrics(scored)
  rows = [(label, f'{metrics[name]:.3f}') for name, label in _LABELS.items()]
  table(f'{len(held_out)} held-out pairs', ('', ''), rows)
  return {f'held_out_{name}': value for name, value in metrics.items()}


def make_job(
  plan: JobPlan,
  load: Callable[[Stage], Any],
  run: Callable[..., dict[str, Any]],
  functions: Callable[[Settings], tuple[str, ...]] = lambda settings: (),
) -> Job:
  """Returns the job of the plan's name, which reads the section of that name."""
  name = plan.name
  return Job(
    name=name,
    load=load,
    run=run,
    sections=(*COMMON, 'policy', 'reference', 'lora', name, 'compat'),
    inputs=(POLICY, REFERENCE, data_input('pairs')),
    functions=functions,
    outputs=('model', HELD_OUT_FILE),
    batch_keys=plan.batch_keys,
    summary=('held_out_accuracy',),
    num_networks=lambda s: 2,
    tokens_per_step=lambda s: 2 * getattr(s, name).batch_size * s.data.max_length,
    num_steps=lambda s, rows: _count_steps(getattr(s, name), rows, name),
    passes=lambda s: 4.0,  # an update, and the reference
    headline=_headline,
    plan=plan,
  )


def _headline(stage: Stage, results: dict[str, Any]) -> str:
  if not results.get('held_out_steps', 1):
    return ''
  if 'held_out_steps' in results:
    return (
      f'the score has the sign of the label in {results["held_out_accuracy"]:.1%} of '
      f'{results["held_out_steps"]:,} held-out steps'
    )
  share, total = results['held_out_accuracy'], results['held_out_pairs']
  low, high = wilson(share * total, total)
  score = 'scores higher' if stage.name == 'reward' else 'has the higher implicit reward'
  return (
    f'the chosen response {score} in {share:.1%} of {total:,} held-out pairs, 95 % interval '
    f'[{low:.1%}, {high:.1%}]'
  )


def _count_steps(settings: PairTraining, rows: int, section: str) -> int:
  held_out = math.ceil(settings.holdout_fraction * rows)  # at least: prompts stay whole
  return training_loop.count_known_steps(settings, rows - held_out, section)
