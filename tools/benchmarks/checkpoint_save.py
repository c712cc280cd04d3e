"""Times a checkpoint: how long it blocks the training loop, and when it is written completely."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from segjax.config.settings import CheckpointSettings
from segjax.report.console import log, table
from segjax.train.checkpoint import Checkpointer
from segjax.train.optimizer import TrainState

_ARRAYS = 8  # per tree


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  parser.add_argument('--gigabytes', type=float, default=1.0, help='size of weights and moments')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--directory', default=None, help='default: a temporary one')


def run(gigabytes: float, repeats: int, directory: str | None) -> dict:
  """Saves a state of weights and two moments several times; returns medians in seconds."""
  size = int(gigabytes * 1e9 / 4 / 3 / _ARRAYS)
  weights, mu, nu = (
    {f'{name}{i}': jax.random.normal(jax.random.key(i), (size,)) for i in range(_ARRAYS)}
    for name in ('w', 'm', 'v')
  )
  state = TrainState(jnp.int32(0), weights, {'mu': mu, 'nu': nu})
  jax.block_until_ready(state)
  blocked, written = [], []
  with tempfile.TemporaryDirectory(dir=directory) as directory:
    checkpointer = Checkpointer(Path(directory), keep=2)
    for step in range(1, repeats + 2):
      begin = time.perf_counter()
      checkpointer.save(step, {'policy': state})
      blocked.append(time.perf_counter() - begin)
      checkpointer.settle()
      written.append(time.perf_counter() - begin)
    checkpointer.close()
  seconds = CheckpointSettings().every_minutes * 60
  result = {
    'gigabytes': gigabytes,
    'blocked_seconds': statistics.median(blocked[1:]),  # the first save compiles
    'written_seconds': statistics.median(written[1:]),
    'interval_seconds': seconds,
  }
  result['blocked_percent'] = 100 * result['blocked_seconds'] / seconds
  table(
    f'a state of {gigabytes:g} GB, medians of {repeats}',
    ('', 'seconds'),
    [
      ('training loop blocked', f'{result["blocked_seconds"]:.3f}'),
      ('written completely', f'{result["written_seconds"]:.3f}'),
    ],
  )
  log(f'blocked for {result["blocked_percent"]:.2f} % of the {seconds:g} s between two saves')
  return result
