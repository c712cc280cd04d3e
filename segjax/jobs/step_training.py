"""Training of a reward model on labels of steps, as the job reward does it with such rows."""

import json
from typing import Any

import numpy as np

from segjax import processes
from segjax.config.settings import PairTraining, RewardTraining
from segjax.data.batches import Steps, batch_indices, eval_batches, select, split_holdout
from segjax.data.rows import Rows
from segjax.data.step_labels import tokenize_steps
from segjax.errors import UserError
from segjax.jobs.pair_training import HELD_OUT_FILE, Network
from segjax.model.llama import LlamaConfig
from segjax.report.timing import time_evaluation
from segjax.run import inputs, provenance, training_loop
from segjax.run.stage import Stage
from segjax.run.weights import Weights, log_memory, save_network
from segjax.storage import write_text_atomically
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.step_label_step import label_sums, step_label_step

_SHOW = ('reward_model/loss', 'reward_model/accuracy')
_MAX_EVAL_ROWS = 512  # held-out rows of an evaluation during training
_OF_PAIRS = ('margin', 'rating_margin_coef', 'label_smoothing', 'entropy_cache_dir')


def load_steps(stage: Stage, rows: Rows, network: Network) -> Steps:
  """Tokenizes the rows of config.data, whose steps have labels.

  Raises:
    UserError: a setting has no effect on such rows.
  """
  s, defaults = stage.settings, RewardTraining()
  for name in (*_OF_PAIRS, 'threshold_search'):
    if getattr(s.reward, name) != getattr(defaults, name):
      raise UserError(
        f'config.reward.{name} is for pairs, and {rows.name} has labels of `steps`; leave it out, '
        'or train on pairs.'
      )
  limits = inputs.length_limits(s.data, network.config, stage.log)
  steps = tokenize_steps(rows, network.tokenizer, limits)
  inputs.log_dataset(steps, stage.log)
  return steps


def run(stage: Stage, network: Network, steps: Steps, weights: Weights) -> dict[str, Any]:
  """Trains the network on all rows but those held out by prompt; writes `model/`.

  Returns:
    steps, loss, held_out_rows, held_out_steps, held_out_loss and held_out_accuracy.
  """
  s, (source, config, head, tokenizer, _) = stage.settings.reward, network
  train_set, held_out = split_holdout(steps, s.holdout_fraction, stage.settings.seed)
  stage.log(f'{len(held_out)} responses with labelled steps held out by prompt')
  eval_subset = select(held_out, np.arange(min(len(held_out), _MAX_EVAL_ROWS)))
  num_steps = training_loop.count_steps(s, len(train_set), stage.name)
  trainable = weights.trained(source, config, head, stage.key('head'))
  stage.log(f'training {trainable.describe()}')
  states = {stage.name: init_state(trainable.params, s.optimizer, num_steps, stage.key('rounding'))}
  log_memory(states | {'base': trainable.base}, stage.mesh, stage.log)

  def step_fn(states, step):
    rows = batch_indices(len(train_set), s.batch_size, stage.settings.seed, step)
    lengths = train_set.tokens.lengths[rows]
    packing, efficiency = training_loop.plan_packing_for(s, lengths, stage.mesh, config)
    batch = stage.gather(train_set, rows)
    state, metrics = step_label_step(
      states[stage.name],
      batch,
      packing,
      trainable.base,
      config=config,
      settings=_pair_settings(s),
      total_steps=num_steps,
    )
    metrics = training_loop.prefix_metrics('reward_model', metrics) | efficiency
    metrics |= throughput.update(lengths, config, head)
    if s.eval_every and (step + 1) % s.eval_every == 0:
      params = trainable.base | state.params
      metrics |= time_evaluation(
        lambda: training_loop.prefix_metrics('eval', _evaluate(stage, params, eval_subset, config)),
        step=metrics,
      )
    return {stage.name: state}, metrics

  states, last = training_loop.train(stage, states, step_fn, num_steps, _SHOW)
  params = states[stage.name].params
  if processes.is_first():
    write_text_atomically(stage.directory / HELD_OUT_FILE, json.dumps(held_out.row.tolist()))
  results = {'loss': last.get('reward_model/loss'), 'held_out_rows': len(held_out)}
  results['held_out_steps'] = int(sum((~np.isnan(row)).sum() for row in _rows(held_out)))
  figures = dict.fromkeys(('loss', 'accuracy'))
  if len(held_out):
    figures = _evaluate(stage, trainable.base | params, held_out, config)
  results |= {f'held_out_{name}': value for name, value in figures.items()}
  card = provenance.card(stage, results, steps, _SHOW)
  save_network(
    stage.model_directory, params, config, head, source=source, card=card, tokenizer=tokenizer
  )
  return {'steps': num_steps} | results


def _rows(steps: Steps) -> list[np.ndarray]:
  return [steps.labels[index] for index in range(len(steps))]


def _pair_settings(settings: RewardTraining) -> PairTraining:
  """Returns what the step reads: other segments need no other program."""
  return PairTraining(**{name: getattr(settings, name) for name in vars(PairTraining())})


def _evaluate(stage: Stage, params: Any, held_out: Steps, config: LlamaConfig) -> dict[str, float]:
  """Returns loss and accuracy on held-out rows, means over their steps."""
  totals = {'loss': 0.0, 'accuracy': 0.0, 'steps': 0.0}
  for rows, num_real in eval_batches(len(held_out), stage.settings.reward.batch_size):
    batch = stage.gather(held_out, rows)
    sums = processes.to_host(label_sums(params, batch, np.int32(num_real), config=config))
    totals = {name: total + float(sums[name]) for name, total in totals.items()}
  return {name: totals[name] / max(totals['steps'], 1.0) for name in ('loss', 'accuracy')}
