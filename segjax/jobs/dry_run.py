"""--dry_run: prints the resolved config, and parameters and tokens of each stage."""

import dataclasses
import json
from pathlib import Path

from segjax.config.settings import Data, Settings
from segjax.data.sources import load_rows
from segjax.jobs import pipeline
from segjax.jobs.registry import JOBS
from segjax.model.llama import num_parameters
from segjax.report.console import log, table
from segjax.run.models import find_network_config
from segjax.run.stage import Stage


def run(settings: Settings, stages: list[Stage]) -> None:
  """Prints the settings as JSON, then a table with a line per stage. Downloads nothing."""
  log(json.dumps(dataclasses.asdict(settings), indent=2))
  log('')
  columns = ('stage', 'networks x parameters', 'steps', 'tokens a step', 'total tokens')
  table('What each stage does, at most', columns, [_row(stage) for stage in stages])
  missing = {key: stage.name for stage in stages for key in pipeline.missing_keys(stage)}
  for key, name in missing.items():
    log(f'required but not set: --config.{key}=..., for {name}')
  log('dry run: the settings are consistent; no weights were loaded and nothing was written')


def _row(stage: Stage) -> tuple[str, ...]:
  job, settings = JOBS[stage.name], stage.settings
  config = find_network_config(settings)
  size = _count(num_parameters(config)) if config else '?'
  networks = f'{job.num_networks} x {size}'
  if job.tokens_per_step is None:
    return stage.name, networks, '', '', ''
  tokens = job.tokens_per_step(settings)
  steps = job.num_steps(settings, _num_rows(settings.data))
  total = _count(tokens * steps) if steps else '?'
  return stage.name, networks, str(steps or '?'), _count(tokens), total


def _num_rows(data: Data) -> int:
  """Returns the number of rows of config.data, 0 if they are not local."""
  if not data.path or not Path(data.path).expanduser().exists():
    return 0
  return len(load_rows(data.path, data.split, data.max_rows))


def _count(number: int) -> str:
  """Returns a number in human form: 8.03 B, 134 k."""
  for size, unit in ((10**12, 'T'), (10**9, 'B'), (10**6, 'M'), (10**3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {unit}'
  return str(number)
