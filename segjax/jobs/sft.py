"""Supervised fine-tuning: conversations to a policy that answers as they do."""

from typing import Any

from segjax.config.settings import Settings
from segjax.data.batches import batch_indices
from segjax.data.tokenize import tokenize_conversations
from segjax.data.tokenizer import load_tokenizer
from segjax.hf.writer import save_checkpoint
from segjax.jobs.job import COMMON, POLICY, Job, data
from segjax.plan import programs
from segjax.run import inputs, models, provenance, training_loop
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.sft_step import sft_step

SHOW = ['train/loss', 'train/entropy']  # of the metrics, beside the bar and in the card's curves


def run(stage: Stage) -> dict[str, Any]:
  """Trains config.policy.path on config.data.path; writes `model/`, returns the last metrics."""
  s, settings = stage.settings, stage.settings.sft
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  config = models.load_network_config(source, s.runtime, stage.mesh, stage.log, trained=True)
  tokenizer = load_tokenizer(str(source), s.data.chat_template)
  dataset = tokenize_conversations(
    inputs.load_config_rows(s.data), tokenizer, inputs.length_limits(s.data, config, stage.log)
  )
  inputs.log_dataset(dataset, stage.log)
  total = training_loop.count_steps(
    settings.max_steps, settings.num_epochs, len(dataset), settings.batch_size, 'sft.batch_size'
  )
  params = models.load_params(source, config, 'language', s.runtime, stage.mesh, trained=True)

  def step_fn(states, step):
    rows = batch_indices(len(dataset), settings.batch_size, stage.settings.seed, step)
    batch = dataset.gather(rows, stage.to_device)
    lengths = dataset.tokens.lengths(rows)
    packing, fill = training_loop.plan_packing_for(settings, lengths)
    state, metrics = sft_step(
      states['policy'], batch, packing, config=config, settings=settings, total_steps=total
    )
    work = throughput.update(lengths, config, 'language')
    return {'policy': state}, training_loop.prefix_metrics('train', metrics) | fill | work

  states = {'policy': init_state(params, settings.optimizer, total)}
  models.log_memory(states, stage.mesh, stage.log)
  states, last = training_loop.train(stage, states, step_fn, total, SHOW)
  save_checkpoint(
    stage.model_directory,
    states['policy'].params,
    config,
    'language',
    source=source,
    card=provenance.card(stage, {name: last.get(name) for name in SHOW}, dataset, SHOW),
  )
  return {'steps': total, 'loss': last.get('train/loss'), 'rows': len(dataset)}


def _num_steps(settings: Settings, rows: int) -> int:
  s = settings.sft
  if s.max_steps or not rows:
    return s.max_steps
  return training_loop.count_steps(0, s.num_epochs, rows, s.batch_size, 'sft.batch_size')


JOB = Job(
  name='sft',
  run=run,
  sections=(*COMMON, 'policy', 'sft'),
  inputs=(POLICY, data('sft')),
  outputs=('model',),
  batch_keys=programs.SFT.batch_keys,
  summary=('loss',),
  tokens_per_step=lambda s: s.sft.batch_size * s.data.max_length,
  num_steps=_num_steps,
  plan=programs.SFT,
)
