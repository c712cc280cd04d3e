"""Supervised fine-tuning: conversations to a policy that answers as they do."""

from typing import Any

from segjax.data.batches import batch_indices
from segjax.data.tokenize import tokenize_conversations
from segjax.hf.writer import save_checkpoint
from segjax.run import provenance
from segjax.run import stage as jobs
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.sft_step import sft_step

SHOW = ['train/loss', 'train/entropy']  # of the metrics, beside the bar and in the card's curves


def run(stage: Stage) -> dict[str, Any]:
  """Trains config.policy.path on config.data.path; writes `model/`, returns the last metrics."""
  settings = stage.settings.sft
  source = jobs.resolve_checkpoint(stage.settings.policy.path, 'policy.path')
  config = jobs.load_network_config(stage, source, trained=True)
  tokenizer = jobs.load_stage_tokenizer(stage, source)
  dataset = tokenize_conversations(
    jobs.load_config_rows(stage), tokenizer, jobs.length_limits(stage, config)
  )
  jobs.log_dataset(stage, dataset)
  total = jobs.num_steps(
    settings.max_steps, settings.num_epochs, len(dataset), settings.batch_size, 'sft'
  )
  params = jobs.load_params(stage, source, config, 'language', trained=True)

  def step_fn(states, step):
    rows = batch_indices(len(dataset), settings.batch_size, stage.settings.seed, step)
    batch = dataset.gather(rows, stage.place)
    lengths = dataset.tokens.lengths(rows)
    packing, fill = jobs.plan_packing_for(settings, lengths)
    state, metrics = sft_step(
      states['policy'], batch, packing, config=config, settings=settings, total_steps=total
    )
    work = throughput.update(lengths, config, 'language')
    return {'policy': state}, jobs.prefix_metrics('train', metrics) | fill | work

  states = {'policy': init_state(params, settings.optimizer, total)}
  jobs.log_memory(stage, states)
  states, last = jobs.train(stage, states, step_fn, total, SHOW)
  save_checkpoint(
    stage.model_directory,
    states['policy'].params,
    config,
    'language',
    source=source,
    card=provenance.card(stage, {name: last.get(name) for name in SHOW}, dataset, SHOW),
  )
  return {'steps': total, 'loss': last.get('train/loss'), 'rows': len(dataset)}
