"""Writes the tokenizer, the rows and an untrained network of the built-in language.

The other jobs read them like a user's own: an HF directory and JSON lines.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from segjax import processes
from segjax.data import demo_rows, languages
from segjax.data.sources import load_rows
from segjax.data.tokenizer import load_tokenizer
from segjax.hf.tokenizer_writer import copy_tokenizer
from segjax.hf.writer import save_checkpoint
from segjax.jobs.job import Job, Results
from segjax.model.heads import init_params
from segjax.model.llama import make_config, num_parameters
from segjax.report.console import log, table, track
from segjax.run.stage import Stage
from segjax.storage import write_text_atomically

_RESULTS_FILE = 'results.json'


def run(stage: Stage) -> dict[str, Any]:
  """Writes `rows/` (see `data.demo_rows.write`) and `model/`, with random weights."""
  s = stage.settings.demo
  language = languages.make_language(s.language, s.min_clauses, s.max_clauses)
  counts = demo_rows.RowCounts(s.sft_rows, s.pairs)
  rows = stage.directory / 'rows'
  for _ in track(stage.name, ('rows',), 1, 'rows'):
    if processes.is_first():
      demo_rows.write(rows, language, counts, stage.settings.seed)
    processes.barrier('rows')
    stage.mirror.push_and_wait()  # every process reads what the first has written
  tokenizer = load_tokenizer(str(rows / 'tokenizer'))
  network = dataclasses.replace(stage.settings.network, vocab_size=len(tokenizer.tokenizer))
  config = make_config(network)
  params = jax.jit(init_params, static_argnums=(1, 2))(stage.key('params'), config, 'language')
  save_checkpoint(stage.model_directory, params, config, 'language', tokenizer=tokenizer)
  if processes.is_first():
    copy_tokenizer(rows / 'tokenizer', stage.model_directory)
  return {'parameters': num_parameters(config), 'pairs': s.pairs, 'sft_rows': s.sft_rows}


def write_results(stage: Stage, results: dict[str, Results], started: float) -> None:
  """Writes results.json of a whole demo run, with the figures by which it is judged.

  Does nothing unless the run has a reward model and an evaluation.

  Args:
    results: the results of each stage, by name.
    started: time.monotonic() of the process's start.
  """
  if not {'reward', 'evaluate'} <= set(results):
    return
  workdir = stage.directory.parent
  held_out = json.loads((workdir / 'reward' / 'held_out.json').read_text(encoding='utf-8'))
  accuracy = {
    'held_out': results['reward']['held_out_accuracy'],
    'best_possible': best_possible_accuracy(workdir / 'demo' / 'rows', held_out),
  }
  record = {
    'seed': stage.settings.seed,
    'wall_seconds': time.monotonic() - started,
    **_evaluation_figures(results['evaluate']),
    'reward_accuracy': accuracy,
  }
  path = workdir / _RESULTS_FILE
  write_text_atomically(path, json.dumps(record, indent=2) + '\n')
  table(
    'Reward model, held-out pairs',
    ('', 'reached', 'best possible'),
    [('accuracy', f'{accuracy["held_out"]:.3f}', f'{accuracy["best_possible"]:.3f}')],
  )
  log(f'policy   {workdir / "ppo" / "model"}')
  log(f'figures  {path}')


def update_results(stage: Stage, results: dict[str, Results], _: float) -> None:
  """Writes the figures of a later evaluation into the results.json of a demo run.

  Without it the file would contradict report.html. A file that `write_results` did not write is
  left as it is.
  """
  path = stage.directory.parent / _RESULTS_FILE
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return
  if isinstance(record, dict) and 'reward_accuracy' in record:
    record |= _evaluation_figures(results['evaluate'])
    write_text_atomically(path, json.dumps(record, indent=2) + '\n')


def _evaluation_figures(results: Results) -> dict[str, Any]:
  before, after = results['before'], results['after']

  def both_models(key):
    return {'before': before.get(key), 'after': after.get(key)}

  return {
    'gold': both_models('gold'),
    'kl_nats': after['kl_nats'],
    'eos_rate': both_models('eos_rate'),
    'length': both_models('length'),
    'segments': both_models('segments'),
    'boundary_f1': before.get('boundary_f1'),
  }


def best_possible_accuracy(rows: Path, held_out: list[int]) -> float:
  """Returns the share of pairs whose label the gold reward agrees with; a tie counts half.

  Args:
    rows: the directory of the demo's rows.
    held_out: indices of pairs.
  """
  pairs = load_rows(str(rows / 'pairs.jsonl.gz'))
  agreed = 0.0
  for index in held_out:
    row = pairs[index]
    prompt = row['messages'][-1]['content']
    chosen, rejected = (languages.gold(prompt, row[side]) for side in ('chosen', 'rejected'))
    agreed += (chosen > rejected) + 0.5 * (chosen == rejected)
  return agreed / len(held_out)


JOB = Job(
  name='demo',
  run=run,
  sections=('seed', 'demo', 'network'),
  outputs=('model', 'rows'),
  summary=('parameters', 'sft_rows', 'pairs'),
  after_run=write_results,
)
