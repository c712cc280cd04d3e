"""Supervised fine-tuning (SFT) of a policy on conversations."""

from typing import Any

from segjax.data.batches import batch_indices
from segjax.data.tokenize import tokenize_conversations
from segjax.data.tokenizer import load_tokenizer
from segjax.hf.writer import save_checkpoint
from segjax.jobs.job import COMMON, POLICY, Job, data_input
from segjax.plan import programs
from segjax.run import inputs, models, provenance, training_loop
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.optimizer import init_state
from segjax.train.sft_step import sft_step

SHOW = ('sft/loss', 'sft/entropy')  # next to the progress bar and in the model card's curves


def run(stage: Stage) -> dict[str, Any]:
  """Trains config.policy.path on config.data.path; writes `model/`.

  Returns:
    steps, loss (nats per token, of the last step), rows.
  """
  s = stage.settings
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  config = models.load_network_config(source, s.runtime, stage.mesh, stage.log, trained=True)
  tokenizer = load_tokenizer(str(source), s.data.chat_template)
  limits = inputs.length_limits(s.data, config, stage.log)
  dataset = tokenize_conversations(inputs.load_config_rows(s.data), tokenizer, limits)
  inputs.log_dataset(dataset, stage.log)
  num_steps = training_loop.count_steps(s.sft, len(dataset), 'sft')
  params = models.load_params(source, config, 'language', s.runtime, stage.mesh, trained=True)

  def step_fn(states, step):
    rows = batch_indices(len(dataset), s.sft.batch_size, s.seed, step)
    lengths = dataset.tokens.lengths(rows)
    packing, efficiency = training_loop.plan_packing_for(s.sft, lengths)
    batch = dataset.gather(rows, stage.to_device)
    state, metrics = sft_step(
      states['policy'], batch, packing, config=config, settings=s.sft, total_steps=num_steps
    )
    metrics = training_loop.prefix_metrics('sft', metrics)
    return {'policy': state}, metrics | efficiency | throughput.update(lengths, config, 'language')

  states = {'policy': init_state(params, s.sft.optimizer, num_steps, stage.key('rounding'))}
  models.log_memory(states, stage.mesh, stage.log)
  states, last = training_loop.train(stage, states, step_fn, num_steps, SHOW)
  card = provenance.card(stage, {name: last.get(name) for name in SHOW}, dataset, SHOW)
  params = states['policy'].params
  save_checkpoint(stage.model_directory, params, config, 'language', source=source, card=card)
  return {'steps': num_steps, 'loss': last.get('sft/loss'), 'rows': len(dataset)}


JOB = Job(
  name='sft',
  run=run,
  sections=(*COMMON, 'policy', 'sft'),
  inputs=(POLICY, data_input('sft')),
  outputs=('model',),
  batch_keys=programs.SFT.batch_keys,
  summary=('loss',),
  tokens_per_step=lambda s: s.sft.batch_size * s.data.max_length,
  num_steps=lambda s, rows: training_loop.count_known_steps(s.sft, rows, 'sft'),
  plan=programs.SFT,
)
