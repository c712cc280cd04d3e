"""Supervised fine-tuning (SFT) of a policy on conversations."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax import processes
from segjax.data.batches import (
  Conversations,
  batch_indices,
  eval_batches,
  select,
  split_holdout,
)
from segjax.data.tokenize import tokenize_conversations
from segjax.data.tokenizer import ChatTokenizer
from segjax.jobs import run_end
from segjax.jobs.job import COMMON, POLICY, Job, data_input
from segjax.model.llama import LlamaConfig
from segjax.plan import programs
from segjax.run import inputs, models, provenance, training_loop
from segjax.run.stage import Stage
from segjax.run.weights import Weights, log_memory, save_network
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.sft_step import sft_step, sft_sums

_MAX_EVAL_ROWS = 512  # held-out conversations of an evaluation during training
SHOW = ('sft/loss', 'sft/entropy')  # next to the progress bar and in the model card's curves


class Loaded(NamedTuple):
  """The directory of the policy, its network and tokenizer, the conversations."""

  source: Path
  config: LlamaConfig
  tokenizer: ChatTokenizer
  dataset: Conversations


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  config = models.load_trained_config(stage, 'sft', source)
  tokenizer = inputs.load_chat_tokenizer(source, s.data)
  tokenizer = tokenizer.for_networks({'policy': config})
  limits = inputs.length_limits(s.data, config, stage.log)
  dataset = tokenize_conversations(inputs.load_config_rows(s.data, stage.log), tokenizer, limits)
  inputs.log_dataset(dataset, stage.log)
  return Loaded(source, config, tokenizer, dataset)


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Trains config.policy.path on config.data.path; writes `model/`.

  Returns:
    steps, rows trained on, loss (nats per token, of the last step); with held-out conversations
    held_out_rows and held_out_loss.
  """
  s = stage.settings
  source, config, tokenizer, dataset = loaded
  train_set, held_out = split_holdout(dataset, s.sft.holdout_fraction, s.seed)
  eval_subset = select(held_out, np.arange(min(len(held_out), _MAX_EVAL_ROWS)))
  num_steps = training_loop.count_steps(s.sft, len(train_set), 'sft')
  network = Weights(s.runtime, stage.mesh).trained(source, config, 'language', stage.key('adapter'))
  stage.log(f'training {network.describe()}')

  def step_fn(states, step):
    rows = batch_indices(len(train_set), s.sft.batch_size, s.seed, step)
    lengths = train_set.tokens.lengths[rows]
    packing, efficiency = training_loop.plan_packing_for(s.sft, lengths, stage.mesh, config)
    batch = stage.gather(train_set, rows)
    state, metrics = sft_step(
      states['policy'],
      batch,
      packing,
      network.base,
      config=config,
      settings=s.sft,
      total_steps=num_steps,
    )
    metrics = training_loop.prefix_metrics('sft', metrics)
    if s.sft.eval_every and (step + 1) % s.sft.eval_every == 0:
      evaluated = _evaluate(stage, network.base | state.params, eval_subset, config)
      metrics |= training_loop.prefix_metrics('eval', evaluated)
    return {'policy': state}, metrics | efficiency | throughput.update(lengths, config, 'language')

  states = {'policy': init_state(network.params, s.sft.optimizer, num_steps, stage.key('rounding'))}
  log_memory(states | {'base': network.base}, stage.mesh, stage.log)
  states, last = training_loop.train(stage, states, step_fn, num_steps, SHOW)
  results = {'loss': last.get('sft/loss')}
  if len(held_out):
    results['held_out_rows'] = len(held_out)
    params = network.base | states['policy'].params
    results['held_out_loss'] = _evaluate(stage, params, held_out, config)['loss']
    stage.log(f'loss on {len(held_out)} held-out rows {results["held_out_loss"]:.3f}')
  card = provenance.card(stage, {name: last.get(name) for name in SHOW}, dataset, SHOW)
  params = states['policy'].params
  save_network(
    stage.model_directory, params, config, 'language', source=source, card=card, tokenizer=tokenizer
  )
  return {'steps': num_steps, 'rows': len(train_set)} | results


def _evaluate(
  stage: Stage, params: Any, held_out: Conversations, config: LlamaConfig
) -> dict[str, float]:
  """Returns loss and entropy on held-out conversations, nats per token."""
  totals: dict[str, float] = {'loss': 0.0, 'entropy': 0.0, 'tokens': 0.0}
  for rows, num_real in eval_batches(len(held_out), stage.settings.sft.batch_size):
    batch = stage.gather(held_out, rows)
    sums = processes.to_host(sft_sums(params, batch, np.int32(num_real), config=config))
    totals = {name: total + float(sums[name]) for name, total in totals.items()}
  return {name: totals[name] / totals['tokens'] for name in ('loss', 'entropy')}


JOB = Job(
  name='sft',
  load=load,
  run=run,
  sections=(*COMMON, 'policy', 'lora', 'sft'),
  inputs=(POLICY, data_input('sft')),
  outputs=('model',),
  batch_keys=programs.SFT.batch_keys,
  summary=('loss',),
  tokens_per_step=lambda s: s.sft.batch_size * s.data.max_length,
  num_steps=lambda s, rows: training_loop.count_known_steps(s.sft, rows, 'sft'),
  passes=lambda s: 3.0,
  headline=lambda stage, results: run_end.describe_change(
    stage, 'sft/loss', 'cross-entropy, nats per token,'
  ),
  plan=programs.SFT,
)
