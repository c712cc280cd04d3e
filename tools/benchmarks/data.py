"""Times the data of a reward run from its start to its first batch, and measures its memory.

Everything runs in processes of its own, as a job does it, but without the model: the tokenizer and
the rows are loaded, tokenized, held out by prompt and gathered to a batch on the host. The second
start finds the tokens of the first one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import data_rows

from segjax.report.console import table

_ROOT = Path(__file__).resolve().parents[2]
_JOB = """
import hashlib, json, os, sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import numpy as np
from segjax.data import batches
from segjax.data.tokenizer import load_tokenizer
try:
  from segjax.data.limits import Limits
  from segjax.data.tokenize import tokenize_pairs
except ImportError:  # of an earlier commit
  from segjax.data.encoding import Limits, encode_pairs as tokenize_pairs
has_steps = sys.argv[4] == 'steps'
if has_steps:
  from segjax.data.step_labels import has_step_labels
  try:
    from segjax.data.tokenize import tokenize_steps
  except ImportError:
    from segjax.data.step_labels import tokenize_steps
try:
  from segjax.data.rows import Reading
  from segjax.data.lazy_rows import open_rows
  rows = open_rows(sys.argv[2], 'train', 0, Reading(log=print))
except ImportError:
  from segjax.data.sources import load_rows
  rows = load_rows(sys.argv[2])
if has_steps:
  assert has_step_labels(rows)  # as the job asks before it reads the rest
tokenize = tokenize_steps if has_steps else tokenize_pairs
data = tokenize(rows, load_tokenizer(sys.argv[3]), Limits(2048, 1728))
del rows
train_set, held_out = batches.split_holdout(data, 0.05, 0)
train_set.gather(batches.batch_indices(len(train_set), 64, 0, 0))
seconds, digest = time.perf_counter() - start, hashlib.sha256(str(len(data)).encode())
for step in range(20):  # of all rows: other commits hold out others
  batch = data.gather(batches.batch_indices(len(data), 64, 0, step))
  for side in [batch] if has_steps else (batch.chosen, batch.rejected):
    for x in side if has_steps else (side.ids, side.response_mask, side.finished):
      digest.update(np.asarray(x).tobytes())
times = os.times()
print(json.dumps({'seconds': seconds, 'cpu_seconds': sum(times[:4]), 'sha256': digest.hexdigest()}))
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  parser.add_argument('--rows', type=int, default=20_000, help='rows of UltraFeedback lengths')
  parser.add_argument('--form', choices=('pairs', 'steps'), default='pairs', help='of the rows')
  parser.add_argument('--other', default='', help='another checkout, whose first start is timed')
  parser.add_argument('--directory', default='', help='for rows and tokens; kept if it is named')


def run(rows: int, form: str, other: str, directory: str) -> dict:
  """Writes the rows, starts a run twice, and another checkout's once."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(directory or temporary)
    path, tokenizer = folder / f'{form}{rows}.jsonl', folder / 'tokenizer'
    if not path.exists():
      data_rows.write_rows(path, rows, form)
    if not tokenizer.exists():
      data_rows.write_tokenizer(tokenizer, path)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
      starts = {
        name: _start(_ROOT, path, tokenizer, form, cache)
        for name in ('first_start', 'second_start')
      }
    if other:
      starts['other'] = _start(Path(other).resolve(), path, tokenizer, form, '')
  table(
    f'{rows:,} rows of {form} until the first batch, on {len(os.sched_getaffinity(0))} cores',
    ('', 'seconds', 'of CPU', 'peak memory'),
    [
      (
        name.replace('_', ' '),
        *(f'{start[key]:.1f}' for key in ('seconds', 'cpu_seconds')),
        f'{start["peak_gb"]:.2f} GB',
      )
      for name, start in starts.items()
    ],
  )
  result = {
    'rows': rows,
    'form': form,
    **starts,
    'same_batches': len({s['sha256'] for s in starts.values()}) == 1,
  }
  if other:
    for key in ('seconds', 'cpu_seconds'):
      result[f'{key}_ratio'] = round(starts['other'][key] / starts['first_start'][key], 2)
  return result


def _start(checkout: Path, path: Path, tokenizer: Path, form: str, cache: str) -> dict:
  """Runs the job in a process; returns its record with the peak of its anonymous memory."""
  environment = os.environ | {'SEGJAX_TOKEN_CACHE_DIR': cache, 'JAX_PLATFORMS': 'cpu'}
  arguments = map(str, (checkout, path, tokenizer, form))
  process = subprocess.Popen(
    [sys.executable, '-c', _JOB, *arguments], stdout=subprocess.PIPE, text=True, env=environment
  )
  peak = 0
  while process.poll() is None:
    peak = max(peak, sum(_anonymous_kib(pid) for pid in _family(process.pid)))
    time.sleep(0.1)
  if process.returncode:
    raise RuntimeError(f'the job in {checkout} has failed')
  *_, last = process.stdout.read().splitlines()
  return json.loads(last) | {'peak_gb': round(peak * 1024 / 1e9, 3)}


def _family(pid: int) -> list[int]:
  """Returns a process and its children."""
  try:
    children = Path(f'/proc/{pid}/task').glob('*/children')
    return [pid, *(int(child) for file in children for child in file.read_text().split())]
  except OSError:  # it has ended
    return []


def _anonymous_kib(pid: int) -> int:
  """Returns the resident memory of a process, less pages of files."""
  try:
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
  except OSError:
    return 0
  return sum(int(line.split()[1]) for line in lines if line.startswith('RssAnon:'))
