"""Caches the reference's entropies, or log-probs, over a dataset of pairs on disk.

The reference is frozen: a second epoch, or a second reward model on the same data, reads the cache
instead of running it, and the reference need not stay in memory during training.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.data.batches import Pairs
from segjax.data.ragged import Ragged
from segjax.errors import UserError, first_line
from segjax.run import inputs, source_code, stage_record
from segjax.run.stage import Stage
from segjax.storage import atomic_file, check_space, make_directory
from segjax.train.reward_scoring import SegmentScorer, reference_signal
from segjax.types import PreferenceBatch


def _folder(stage: Stage) -> Path:
  """Returns config.reward.entropy_cache_dir; 'run' is a folder of the stage's own directory."""
  value = stage.settings.reward.entropy_cache_dir
  return stage.directory / 'entropies' if value == 'run' else Path(value).expanduser()


def with_ref_signals(
  stage: Stage, pairs: Pairs, reference: Any, reference_path: Path, scorer: SegmentScorer
) -> Pairs:
  """Returns the pairs with what boundaries read, from config.reward.entropy_cache_dir.

  That is the entropy or the log-prob of every token. Computes and stores these if they are not
  there. The file's name is a hash of everything that decides its content: which of the two, the
  reference's files, the tokens, the compute dtype, and the versions of segjax and its libraries.
  """
  what = {'entropy': 'entropies', 'logprob': 'log-probs'}[scorer.segmenter.signal]
  folder = _folder(stage)
  path = folder / f'{_name(pairs, reference_path, scorer)}.npy'
  if processes.broadcast_from_first(path.exists()):
    stage.log(f'{what} of the reference from {path}')
  else:
    make_directory(folder)
    # Each process writes all of it: the computation needs every host's devices, and another run may
    # fill the same cache.
    with atomic_file(path, tag=f'.{processes.process_index()}-{os.getpid()}') as partial:
      _compute(stage, pairs, reference, scorer, partial)
    processes.barrier('entropies')
    stage.log(f'{what} of the reference stored in {path}')
  sides = pairs.chosen.lengths, pairs.rejected.lengths
  middle, total = np.cumsum([side.sum() for side in sides])
  values = _read(path, int(total))
  return dataclasses.replace(
    pairs,
    chosen_ref_signal=Ragged.end_to_end(values[:middle], sides[0]),
    rejected_ref_signal=Ragged.end_to_end(values[middle:], sides[1]),
  )


def _read(path: Path, count: int) -> np.ndarray:
  """Opens a cache of `count` numbers.

  Raises:
    UserError: the file is damaged, or was written by something else.
  """
  try:
    values = np.load(path, mmap_mode='r')
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f'{path} cannot be read ({first_line(error)}); remove it.') from error
  is_sound = values.shape == (count,) and values.dtype == np.float32
  if not is_sound or not np.isfinite(values).all():
    raise UserError(f'{path} does not hold {count:,} finite numbers in float32; remove it.')
  return values


def _compute(stage: Stage, pairs: Pairs, reference: Any, scorer: SegmentScorer, path: Path) -> None:
  """Writes float32 numbers in nats: the chosen rows end to end, then the rejected rows."""
  lengths = np.concatenate([pairs.chosen.lengths, pairs.rejected.lengths]).astype(np.int64)
  starts = (np.cumsum(lengths) - lengths).reshape(2, -1)
  total = int(lengths.sum())
  # A mapped file that outgrows its disk ends the process by a signal.
  check_space(path, total * np.dtype(np.float32).itemsize)
  values = np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=(total,))
  size = stage.settings.reward.batch_size
  batches = inputs.tracked_batches(stage.name, len(pairs), size, 'entropies')
  for rows, num_real in batches:
    batch = stage.gather(pairs, rows)
    both = processes.to_host(_both_sides(reference, batch, scorer=scorer))
    for start, count, side in zip(starts, lengths.reshape(2, -1), both, strict=True):
      for row, signal in zip(rows[:num_real], side, strict=False):
        values[start[row] : start[row] + count[row]] = signal[: count[row]]
  values.flush()


@functools.partial(jax.jit, static_argnames='scorer')
def _both_sides(
  reference: Any, batch: PreferenceBatch, *, scorer: SegmentScorer
) -> tuple[Any, Any]:
  return tuple(reference_signal(reference, side, scorer) for side in (batch.chosen, batch.rejected))


def _name(pairs: Pairs, reference_path: Path, scorer: SegmentScorer) -> str:
  digest = hashlib.sha256(stage_record.content_hash(reference_path).encode())
  digest.update(repr(source_code.versions()).encode())
  for side in (pairs.chosen, pairs.rejected):
    for row in range(len(side.lengths)):  # not all at once: they may be mapped from a file
      digest.update(side[row].tobytes())
    digest.update(side.lengths.tobytes())
  digest.update(f'{scorer.reference.dtype} {scorer.segmenter.signal}'.encode())
  return digest.hexdigest()[:24]
