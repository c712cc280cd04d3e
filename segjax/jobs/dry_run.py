"""--dry_run: the resolved config, and how many parameters and tokens it means. Loads no weights."""

import dataclasses
import json
import tempfile
from pathlib import Path

from segjax.config.settings import Settings
from segjax.data import demo_rows
from segjax.data.sources import load_rows
from segjax.hf import reader
from segjax.jobs import pipeline
from segjax.model.llama import LlamaConfig, make_config, num_parameters
from segjax.report.console import log, table
from segjax.run.stage import Stage
from segjax.run.training_loop import count_steps

# Networks that a stage holds at once, trained and frozen.
_NETWORKS = {
  **{'demo': 1, 'sft': 1, 'reward': 2, 'normalizer': 2, 'ppo': 4, 'evaluate': 3},
  **{'evaluate_reward': 2, 'answers': 1, 'selfcheck': 4, 'chat': 2},
}


def run(settings: Settings, stages: list[Stage]) -> None:
  """Prints the settings as JSON, then a table with a line per stage. Asks no hub for anything."""
  log(json.dumps(dataclasses.asdict(settings), indent=2))
  rows = []
  for stage in stages:
    config = _network(stage)
    size = _count(num_parameters(config)) if config else '?'
    per_step, steps = _tokens_per_step(stage), _steps(stage)
    total = _count(per_step * steps) if per_step and steps else '?' if per_step else ''
    cells = (str(steps or '?') if per_step else '', _count(per_step) if per_step else '', total)
    rows.append((stage.name, f'{_NETWORKS[stage.name]} x {size}', *cells))
  log('')
  columns = ('stage', 'networks x parameters', 'steps', 'tokens a step', 'tokens in all')
  table('What each stage does, at most', columns, rows)
  missing = {key: stage.name for stage in stages for key in pipeline.missing_keys(stage)}
  for key, name in missing.items():
    log(f'still to be given: --config.{key}=..., for {name}')
  log('dry run: the settings are consistent; no weights were loaded and nothing was written')


def _network(stage: Stage) -> LlamaConfig | None:
  """The policy's network: from its directory if that is here, else config.network's sizes.

  Without a policy it is the reward model's.
  """
  named = stage.settings.policy.path or stage.settings.reward_model.path
  path = Path(named).expanduser()
  if named and path.is_dir():
    return reader.load_config(path)
  network = stage.settings.network
  if not network.vocab_size and 'demo' in stage.settings.stages:
    network = dataclasses.replace(network, vocab_size=_demo_vocabulary())
  return make_config(network) if network.vocab_size else None


def _demo_vocabulary() -> int:
  with tempfile.TemporaryDirectory() as folder:
    demo_rows.write_tokenizer(Path(folder))
    tokenizer = json.loads((Path(folder) / 'tokenizer.json').read_text(encoding='utf-8'))
  return len(tokenizer['model']['vocab'])


def _tokens_per_step(stage: Stage) -> int:
  """The most tokens of one batch, prompt and response; 0 where the stage has no steps."""
  s = stage.settings
  if stage.name == 'ppo':
    return s.ppo.rollout_batch_size * (s.data.max_prompt_length + s.rollout.max_new_tokens)
  sides = {'sft': 1, 'reward': 2, 'normalizer': 2}.get(stage.name, 0)
  return getattr(s, stage.name).batch_size * sides * s.data.max_length if sides else 0


def _steps(stage: Stage) -> int:
  """How often; 0 where data that is not at hand decides it."""
  s = stage.settings
  if stage.name == 'ppo':
    return s.ppo.max_steps
  rows = _rows(stage)
  if stage.name == 'normalizer':
    pairs = min(s.normalizer.max_pairs, rows) if rows else s.normalizer.max_pairs
    return -(-pairs // s.normalizer.batch_size)
  job = getattr(s, stage.name, None)
  if stage.name not in ('sft', 'reward') or not (job.max_steps or rows):
    return 0
  key = f'{stage.name}.batch_size'
  return job.max_steps or count_steps(0, job.num_epochs, rows, job.batch_size, key)


def _rows(stage: Stage) -> int:
  """Rows of the stage's data, 0 if they are not here to be counted."""
  data = stage.settings.data
  if not Path(data.path).expanduser().exists() or not data.path:
    return 0
  return len(load_rows(data.path, data.split, data.max_rows))


def _count(number: int) -> str:
  """Human form: 8.03 B, 134 k."""
  for size, unit in ((10**12, 'T'), (10**9, 'B'), (10**6, 'M'), (10**3, 'k')):
    if number >= size:
      return f'{number / size:.3g} {unit}'
  return str(number)
