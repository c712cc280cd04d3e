"""How long a checkpoint keeps the training loop waiting, and how long it takes behind its back."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from segjax.config.settings import CheckpointSettings
from segjax.train.checkpoint import Checkpointer
from segjax.train.optimizer import TrainState

_LEAVES = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The size of the state."""
  parser.add_argument('--gigabytes', type=float, default=1.0, help='of weights and moments')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--directory', default=None, help='where to write; default a temporary one')


def run(gigabytes: float, repeats: int, directory: str | None) -> dict:
  """Saves a state of weights and two moments again and again; medians."""
  size = int(gigabytes * 1e9 / 4 / 3 / _LEAVES)
  weights, mu, nu = (
    {f'{name}{i}': jax.random.normal(jax.random.key(i), (size,)) for i in range(_LEAVES)}
    for name in ('w', 'm', 'v')
  )
  state = TrainState(jnp.int32(0), weights, {'mu': mu, 'nu': nu})
  jax.block_until_ready(state)
  blocked, written = [], []
  with tempfile.TemporaryDirectory(dir=directory) as place:
    saved = Checkpointer(Path(place), keep=2)
    for step in range(1, repeats + 2):
      begun = time.perf_counter()
      saved.save(step, {'policy': state})
      blocked.append(time.perf_counter() - begun)
      saved.settle()
      written.append(time.perf_counter() - begun)
    saved.close()
  seconds = CheckpointSettings().minutes * 60
  found = {
    'gigabytes': gigabytes,
    'blocked_seconds': statistics.median(blocked[1:]),  # the first one compiles
    'written_seconds': statistics.median(written[1:]),
    'interval_seconds': seconds,
  }
  found['blocked_percent'] = 100 * found['blocked_seconds'] / seconds
  print(f'a state of {gigabytes:g} GB, medians of {repeats}')
  print(f'the loop waits     {found["blocked_seconds"]:8.3f} s')
  print(f'until it is saved  {found["written_seconds"]:8.3f} s')
  print(f'of {seconds:g} s between two saves {found["blocked_percent"]:.2f} %')
  return found
