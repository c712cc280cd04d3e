"""Training of a network on pairs or labels of steps, as the jobs reward and dpo do it."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from segjax import processes
from segjax.config.settings import PairTraining, Settings
from segjax.data.batches import Pairs
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.data.rows import Rows
from segjax.data.tokenize import tokenize_pairs
from segjax.errors import UserError
from segjax.evaluation.intervals import wilson
from segjax.jobs.job import COMMON, POLICY, REFERENCE, Job, data_input
from segjax.jobs.pair_trainer import Network, Trainer, held_out_figures, stage_settings
from segjax.plan.phases import JobPlan
from segjax.report.console import table
from segjax.run import inputs, provenance, training_loop
from segjax.run.stage import Stage
from segjax.run.weights import Weights, log_memory, save_network
from segjax.storage import write_text_atomically
from segjax.train.optimizer import init_state
from segjax.train.preference_step import FrozenParams
from segjax.train.reward_scoring import PairScorer

HELD_OUT_FILE = 'held_out.json'  # rows of the data that were never trained on, from 0
_MAX_EVAL_ROWS = 512  # held-out pairs, and labelled responses, of an evaluation during training

_LABELS = {
  'accuracy': 'the chosen response scores higher',
  'length_baseline_accuracy': 'the longer response is the chosen one',
  'margin': 'mean score of the chosen less that of the rejected response',
  'loss': 'Bradley-Terry loss, nats',
  'ece': 'expected calibration error',
}
_STEP_LABELS = {
  'accuracy': 'the score has the sign of the label',
  'loss': 'binary cross-entropy, nats',
}


def load_pairs(stage: Stage, network: Network, rows: Rows) -> Pairs:
  """Tokenizes the pairs among the rows of config.data."""
  s, settings = stage.settings, stage_settings(stage)
  pairs = tokenize_pairs(
    rows,
    network.tokenizer,
    inputs.length_limits(s.data, network.config, stage.log),
    inputs.pair_rules(s.compat, ratings=settings.rating_margin_coef > 0),
  )
  inputs.log_dataset(pairs, stage.log)
  return pairs


def check_ratings(stage: Stage, pairs: Pairs) -> None:
  """Raises UserError if the margin depends on ratings and no pair has any."""
  coef = stage_settings(stage).rating_margin_coef
  if coef > 0 and np.isnan(pairs.rating_gap).all():
    raise UserError(
      f'config.{stage.name}.rating_margin_coef={coef}, but no pair has ratings; set it to 0, or '
      'provide `chosen_rating` and `rejected_rating`.'
    )


def run(
  stage: Stage,
  network: Network,
  scorer: PairScorer,
  data: PairsAndSteps,
  weights: Weights,
  reference: Any,
) -> dict[str, Any]:
  """Trains the network on all rows but those held out by prompt; writes `model/`.

  Args:
    stage: of the job `reward` or `dpo`, whose section of the settings is read.
    network: the network.
    scorer: how it scores a response.
    data: the rows; `data.pairs_and_steps` says what an update has of them.
    weights: loads the network.
    reference: parameters of the reference; None where it is not run.

  Returns:
    steps, loss, the numbers of what was held out, and held_out_NAME for each of `held_out_figures`.
  """
  s, (source, config, head, tokenizer, group) = stage_settings(stage), network
  train_set, held_out = data.split_holdout(s.holdout_fraction, stage.settings.seed)
  stage.log(f'{held_out.describe()} held out by prompt')
  num_steps = training_loop.count_steps(s, len(train_set.parts[0]), stage.name)
  key = stage.key('head' if head == 'scalar' else 'adapter')
  trainable = weights.trained(source, config, head, key)
  stage.log(f'training {trainable.describe()}')
  states = {stage.name: init_state(trainable.params, s.optimizer, num_steps, stage.key('rounding'))}
  trees = {'reference': reference, 'base': trainable.base}
  log_memory(states | trees, stage.mesh, stage.log)
  eval_subset = held_out.first(_MAX_EVAL_ROWS)
  frozen = FrozenParams(reference, trainable.base)
  trainer = Trainer(stage, network, scorer, frozen, train_set, eval_subset, num_steps)
  show = [f'{group}/{name}' for name in _shown(data, group)]  # the first two beside the bar
  states, last = training_loop.train(stage, states, trainer.step, num_steps, show)
  params = states[stage.name].params
  if processes.is_first():
    write_text_atomically(stage.directory / HELD_OUT_FILE, json.dumps(held_out.row.tolist()))
  metrics = _evaluate_held_out(trainer, trainable.base | params, held_out)
  results = {'loss': last.get(f'{group}/loss')} | metrics
  card = provenance.card(stage, results, data, show)
  save_network(
    stage.model_directory, params, config, head, source=source, card=card, tokenizer=tokenizer
  )
  return {'steps': num_steps} | _held_out_sizes(held_out) | results


def _shown(data: PairsAndSteps, group: str) -> tuple[str, ...]:
  """Returns the metrics of the console."""
  if data.pairs is None:
    return 'loss', 'accuracy'
  if data.steps is not None:
    return 'loss', 'accuracy', 'step_loss'
  return 'loss', 'accuracy', 'segments' if group == 'reward_model' else 'chosen_reward'


def _held_out_sizes(held_out: PairsAndSteps) -> dict[str, int]:
  sizes = {}
  if held_out.pairs is not None:
    sizes['held_out_pairs'] = len(held_out.pairs)
  if held_out.steps is not None:
    sizes['held_out_rows'] = len(held_out.steps)
    sizes['held_out_steps'] = held_out.num_labels()
  return sizes


def _evaluate_held_out(trainer: Trainer, params: Any, held_out: PairsAndSteps) -> dict[str, float]:
  """Prints tables of the metrics of all held-out rows; returns them as held_out_NAME."""
  name, size = trainer.stage.name, stage_settings(trainer.stage).batch_size

  def batches(num_rows: int) -> Iterable[tuple[np.ndarray, int]]:
    return inputs.tracked_batches(name, num_rows, size, 'held-out rows')

  metrics = held_out_figures(trainer, params, held_out, batches)
  if held_out.pairs is not None:
    rows = [(label, f'{metrics[key]:.3f}') for key, label in _LABELS.items()]
    table(f'{len(held_out.pairs)} held-out pairs', ('', ''), rows)
  if held_out.steps is not None:
    prefix = '' if held_out.pairs is None else 'step_'
    rows = [(label, f'{metrics[prefix + key]:.3f}') for key, label in _STEP_LABELS.items()]
    table(f'{held_out.num_labels()} held-out steps', ('', ''), rows)
  return {f'held_out_{key}': value for key, value in metrics.items()}


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
    num_steps=lambda s, rows: count_steps(getattr(s, name), rows, name),
    passes=lambda s: 4.0,  # an update, and the reference
    headline=_headline,
    plan=plan,
  )


def _headline(stage: Stage, results: dict[str, Any]) -> str:
  sentences = []
  if total := results.get('held_out_pairs'):
    share = results['held_out_accuracy']
    low, high = wilson(share * total, total)
    score = 'scores higher' if stage.name == 'reward' else 'has the higher implicit reward'
    sentences.append(
      f'the chosen response {score} in {share:.1%} of {total:,} held-out pairs, 95 % interval '
      f'[{low:.1%}, {high:.1%}]'
    )
  if total := results.get('held_out_steps'):
    share = results.get('held_out_step_accuracy', results['held_out_accuracy'])
    sentences.append(
      f'the score has the sign of the label in {share:.1%} of {total:,} held-out steps'
    )
  return '; '.join(sentences)


def count_steps(settings: PairTraining, rows: int, section: str) -> int:
  """Returns the number of updates for a dry run, see `training_loop.count_known_steps`."""
  held_out = math.ceil(settings.holdout_fraction * rows)  # at least: prompts stay whole
  return training_loop.count_known_steps(settings, rows - held_out, section)
