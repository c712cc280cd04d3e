"""--dry_run: the resolved config, and how many parameters and tokens it means. Loads no weights."""

import dataclasses
import json
from pathlib import Path

from jax.sharding import Mesh

from segjax.hf import reader
from segjax.jobs.pipeline import wire
from segjax.jobs.ppo import check_sizes
from segjax.jobs.stage import Stage, check_batch
from segjax.model.llama import LlamaConfig, config_of, num_parameters
from segjax.report.console import say, table
from segjax.settings import Settings


def run(settings: Settings, workdir: Path, mesh: Mesh) -> None:
  """Prints the settings as JSON, then a table with a line per stage."""
  say(json.dumps(dataclasses.asdict(settings), indent=2))
  rows = []
  for name in settings.stages:
    stage = Stage(name, wire(name, settings, workdir), workdir / name, mesh)
    _check(stage)
    config = _network(stage)
    rows.append((name, _count(num_parameters(config)) if config else '?', *_tokens(stage)))
  table('What each stage does', ('stage', 'parameters', 'steps', 'tokens at most'), rows)
  say('dry run: the settings are consistent; no weights were loaded and nothing was written')


def _check(stage: Stage) -> None:
  """The batch of the stage divides over the mesh."""
  s = stage.settings
  if stage.name == 'ppo':
    check_sizes(stage)
  elif stage.name != 'demo':
    check_batch(f'{stage.name}.batch', getattr(s, stage.name).batch, stage)


def _network(stage: Stage) -> LlamaConfig | None:
  """The policy's network: from its directory if that is here, else config.network's sizes."""
  path = stage.settings.policy.path
  if path and Path(path).is_dir():
    return reader.load_config(path)
  return config_of(stage.settings.network) if stage.settings.network.vocab_size else None


def _tokens(stage: Stage) -> tuple[str, str]:
  """Steps and the most tokens that the stage's networks read; '?' where the data decides."""
  s = stage.settings
  if stage.name == 'ppo':
    length = s.data.max_prompt_length + s.rollout.max_new_tokens
    return str(s.ppo.steps), _count(s.ppo.steps * s.ppo.rollout_batch * length)
  if stage.name in ('sft', 'reward'):
    job = getattr(s, stage.name)
    rows = job.batch * (2 if stage.name == 'reward' else 1)
    steps = job.steps
    return (str(steps), _count(steps * rows * s.data.max_length)) if steps else ('by epochs', '?')
  if stage.name == 'normalizer':
    return '', _count(2 * s.normalizer.pairs * s.data.max_length)
  return '', '?' if stage.name == 'evaluate' else ''


def _count(number: int) -> str:
  """Human form: 8.03 B, 134 k."""
  for size, unit in ((10**12, 'T'), (10**9, 'B'), (10**6, 'M'), (10**3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {unit}'
  return str(number)
