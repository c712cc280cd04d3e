"""--dry_run: checks the inputs, and prints settings, parameters and tokens of each stage."""

import dataclasses
import json

from segjax.config import parse
from segjax.config.settings import Settings, replace
from segjax.jobs import input_check, pipeline
from segjax.jobs.registry import JOBS
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.report.console import log, table
from segjax.run import inputs
from segjax.run.network_sizes import find_network_config
from segjax.run.stage import Stage


def run(settings: Settings, stages: list[Stage], is_full: bool = False) -> None:
  """Prints the settings, then a table with a line per stage. Writes and downloads nothing.

  Args:
    settings: of the run.
    stages: the stages, prepared.
    is_full: prints all settings as JSON, not only those that differ from the defaults.

  Raises:
    UserError: the run would refuse its inputs.
  """
  lines: list[tuple[str, str]] = []
  unchecked = input_check.check(stages, lambda text, name: lines.append((text, name)))
  if is_full:
    log(json.dumps(dataclasses.asdict(settings), indent=2))
  else:
    log('settings that differ from their defaults (all of them: --dry_run=full)')
    for key, value in parse.changed_values(settings).items():
      log(f'  --config.{key}={",".join(value) if isinstance(value, tuple) else value}')
  log('')
  notes: dict[str, None] = {}  # in order, each once
  columns = ('stage', 'networks x parameters', 'steps', 'tokens a step', 'total tokens')
  table('What each stage does, at most', columns, [_row(stage, notes) for stage in stages])
  for note in notes:
    log(note)
  for stage in stages:
    if text := JOBS[stage.name].describe_rows(stage.settings):
      log(text, stage.name)
  for text, name in lines:
    if text.startswith('warning'):  # the other lines count the first rows alone
      log(text, name)
  missing = {key: stage.name for stage in stages for key in pipeline.missing_keys(stage)}
  for key, name in missing.items():
    log(f'required but not set: --config.{key}=..., for {name}')
  if unchecked:
    log(f'not checked, because it is not on this machine: {", ".join(unchecked)}')
  log('dry run: the settings are consistent; no weights were loaded and nothing was written')


def _row(stage: Stage, notes: dict[str, None]) -> tuple[str, ...]:
  """Returns a line of the table; adds to `notes` by what else lengths are limited."""
  job, settings = JOBS[stage.name], stage.settings
  config = find_network_config(settings)
  size = _count(num_parameters(config)) if config else '?'
  networks = f'{job.num_networks(settings)} x {size}'
  if config:
    settings = _limit_lengths(settings, config, 'rollout' in job.sections, notes)
  if job.tokens_per_step is None:
    return stage.name, networks, '', '', ''
  tokens = job.tokens_per_step(settings)
  steps = job.num_steps(settings, inputs.count_local_rows(settings.data))
  total = _count(tokens * steps) if steps else '?'
  return stage.name, networks, str(steps or '?'), _count(tokens), total


def _limit_lengths(
  settings: Settings, config: LlamaConfig, samples: bool, notes: dict[str, None]
) -> Settings:
  """Returns the settings with lengths that fit into the network's positions."""
  data, networks = settings.data, {'policy': config}
  if samples:
    rollout = inputs.fit_rollout(settings.rollout, networks, notes.setdefault)
    limits = inputs.prompt_limits(data, networks, rollout.max_new_tokens, notes.setdefault)
    lengths = {'data.max_prompt_length': limits.max_prompt_length, 'rollout': rollout}
    return replace(settings, **lengths)
  limits = inputs.length_limits(data, config, notes.setdefault)
  return replace(settings, **{'data.max_length': limits.max_length})


def _count(number: int) -> str:
  """Returns a number in human form: 8.03 B, 134 k."""
  for size, unit in ((10**12, 'T'), (10**9, 'B'), (10**6, 'M'), (10**3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {unit}'
  return str(number)
