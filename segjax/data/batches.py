"""Datasets of token ids, the batches gathered from them, and the order of the batches.

Text is tokenized and truncated by `segjax.data.tokenize`. The order has no state: `batch_indices`
computes the rows of any step from (seed, step) alone, so a run resumes by one integer.

Every dataset pads on the right to ONE length, so that each step compiles once. `gather` makes
numpy arrays and passes each to `to_device`; by `model.row_placement` a process gathers the rows of
its own devices alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from segjax import types
from segjax.data.ragged import Ragged
from segjax.data.rows import LocatedRow
from segjax.data.sources import Message, Rows, as_prompt
from segjax.errors import UserError

ToDevice = Callable[[np.ndarray], Any]
Dataset = TypeVar('Dataset', 'Conversations', 'Pairs', 'Prompts', 'Steps')


@dataclasses.dataclass(frozen=True)
class _Tokenized:
  """Rows of tokens.

  Attributes:
    group: 64 bits that are equal for equal prompts, uint64 [N].
    length: tokens to which rows are padded.
    pad_id: id of the padding.
    counts: what became of the rows of the source, see `limits`.
  """

  group: np.ndarray
  length: int
  pad_id: int
  counts: dict[str, int]

  def __len__(self) -> int:
    return len(self.group)

  def _pad(self, values: Ragged, indices: np.ndarray, fill: int | float) -> np.ndarray:
    return values.pad(indices, self.length, fill)[0]


class TokenBatch(NamedTuple):
  """Conversations: ids int32 [B, S]; mask bool [B, S], True on the tokens to imitate."""

  ids: jax.Array
  mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Conversations(_Tokenized):
  """Tokenized conversations; `trained` marks the assistant's tokens."""

  tokens: Ragged
  trained: Ragged

  def gather(self, indices: np.ndarray, to_device: ToDevice = jnp.asarray) -> TokenBatch:
    """Returns the rows at `indices` [B], each array passed to `to_device`."""
    ids = self._pad(self.tokens, indices, self.pad_id)
    return TokenBatch(to_device(ids), to_device(self._pad(self.trained, indices, False)))


@dataclasses.dataclass(frozen=True)
class Pairs(_Tokenized):
  """Tokenized preferences, each side prompt and response together.

  Attributes:
    row: index of each pair in its source, int64 [N].
    rating_gap: rating of the chosen response minus that of the rejected one, float32 [N], NaN
      for rows without ratings.
    truncated: which pairs were truncated, bool [N].
    chosen_ref_signal: `Sequences.ref_signal` of the tokens, if it is cached.
    rejected_ref_signal: the same for the rejected side.
  """

  chosen: Ragged
  rejected: Ragged
  chosen_finished: np.ndarray
  rejected_finished: np.ndarray
  prompt_length: np.ndarray
  rating_gap: np.ndarray
  row: np.ndarray
  truncated: np.ndarray | None = None
  chosen_ref_signal: Ragged | None = None
  rejected_ref_signal: Ragged | None = None

  def gather(self, indices: np.ndarray, to_device: ToDevice = jnp.asarray) -> types.PreferenceBatch:
    """Returns the pairs at `indices` [B], both sides [B, S], each array passed to `to_device`.

    `rating_gap` is None if no row of the dataset has ratings.
    """

    def side(tokens: Ragged, finished: np.ndarray, signal: Ragged | None) -> types.Sequences:
      ids, is_real = tokens.pad(indices, self.length, self.pad_id)
      is_response = np.arange(self.length) >= self.prompt_length[indices][:, None]
      cached = None if signal is None else to_device(self._pad(signal, indices, 0))
      mask = is_real & is_response
      return types.Sequences(to_device(ids), to_device(mask), to_device(finished[indices]), cached)

    chosen = side(self.chosen, self.chosen_finished, self.chosen_ref_signal)
    rejected = side(self.rejected, self.rejected_finished, self.rejected_ref_signal)
    has_ratings = not np.isnan(self.rating_gap).all()  # of all rows: None is another program
    return types.PreferenceBatch(
      chosen, rejected, to_device(self.rating_gap[indices]) if has_ratings else None
    )


class StepBatch(NamedTuple):
  """Responses with labelled steps, ids int32 [B, S] of prompt and response.

  Attributes:
    label: from 0 to 1 at the last token of each labelled step, float32 [B, S]; NaN elsewhere.
  """

  ids: jax.Array
  label: jax.Array


@dataclasses.dataclass(frozen=True)
class Steps(_Tokenized):
  """Tokenized responses whose steps have labels; `row` is the index of each in its source."""

  tokens: Ragged
  labels: Ragged
  row: np.ndarray

  def gather(self, indices: np.ndarray, to_device: ToDevice = jnp.asarray) -> StepBatch:
    """Returns the rows at `indices` [B], each array passed to `to_device`."""
    ids = self._pad(self.tokens, indices, self.pad_id)
    return StepBatch(to_device(ids), to_device(self._pad(self.labels, indices, np.nan)))


@dataclasses.dataclass(frozen=True)
class Prompts(_Tokenized):
  """Tokenized prompts; `row` is the index of each in `source`."""

  tokens: Ragged
  row: np.ndarray
  source: Rows

  def gather(self, indices: np.ndarray, to_device: ToDevice = jnp.asarray) -> types.PromptBatch:
    """Returns the prompts at `indices` [B], each array passed to `to_device`."""
    ids = self._pad(self.tokens, indices, self.pad_id)
    return types.PromptBatch(to_device(ids), to_device(self.tokens.lengths[indices]))

  def columns(self, index: SupportsIndex) -> LocatedRow:
    """Returns the row of data that the prompt comes from."""
    row = int(self.row[index])
    return LocatedRow(self.source[row], self.source.location(row))

  def messages(self, index: SupportsIndex) -> list[Message]:
    """Returns the prompt as written, not truncated, for display."""
    row = self.columns(index)
    return as_prompt(row, row.location)


def split_holdout(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
  """Splits by prompt: all rows of one prompt are on the same side.

  Which prompts are held out depends on the prompts and the seed, not on the order of the rows.
  Both sides keep the dataset's length (one compile) and its counts.

  Args:
    dataset: dataset to split.
    fraction: held-out fraction of the rows, rounded up to whole prompts; 0 holds out none.
    seed: seed of the choice.

  Returns:
    (training set, held-out set), each in the order of the dataset.

  Raises:
    ValueError: the fraction is not in [0, 1), or leaves no prompt to train on.
  """
  return split_holdouts([dataset], fraction, seed)[0]


def split_holdouts(datasets: Sequence[Any], fraction: float, seed: int) -> list[tuple[Any, Any]]:
  """Splits several datasets as `split_holdout` one: a prompt is on the same side in all of them.

  The share is held out of each, and a prompt that is held out of one dataset of all.
  """
  if not 0 <= fraction < 1:
    raise UserError(f'holdout_fraction={fraction} must be at least 0 and below 1.')
  prompts = [_held_out_prompts(dataset.group, fraction, seed) for dataset in datasets]
  splits = []
  for dataset in datasets:
    is_held_out = np.isin(dataset.group, np.concatenate(prompts))
    if is_held_out.all():
      count = len(np.unique(dataset.group))
      raise UserError(
        f'holdout_fraction={fraction} of {count} distinct prompts leaves none to train on; '
        'provide more data or lower it.'
      )
    sides = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    splits.append(tuple(select(dataset, side) for side in sides))
  return splits


def _held_out_prompts(group: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  # np.unique sorts the prompts, so that the order of the rows has no influence.
  prompts, num_rows = np.unique(group, return_counts=True)
  order = np.random.default_rng(seed).permutation(len(prompts))
  before = np.cumsum(num_rows[order]) - num_rows[order]
  return prompts[order[before < fraction * len(group)]]


def select(dataset: Dataset, indices: np.ndarray) -> Dataset:
  """Returns the dataset of the rows at `indices`, in that order."""
  fields = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
  # The source of `Prompts` stays complete: `row` holds indices into it.
  arrays = {k: v.take(indices) for k, v in fields.items() if isinstance(v, Ragged | np.ndarray)}
  return dataclasses.replace(dataset, **arrays)


def batch_indices(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
  """Returns the rows of one training step, int64 [batch].

  Each epoch is a permutation determined by (seed, epoch), split into full batches; its tail, less
  than a batch, is left out.

  Args:
    num_rows: number of rows of the dataset.
    batch: rows per step.
    seed: seed of the order.
    step: step over all epochs, from 0.

  Raises:
    ValueError: a batch is larger than the dataset.
  """
  if not 0 < batch <= num_rows:
    raise UserError(
      f'batch_size={batch} rows cannot be drawn from {num_rows} rows; use 1 to {num_rows}, or '
      'provide more data.'
    )
  epoch, position = divmod(step, num_rows // batch)
  # Copied: a caller that writes to its rows must not change the cached order.
  return _permutation(num_rows, seed, epoch)[position * batch : (position + 1) * batch].copy()


def endless_batch_indices(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
  """Returns the rows of one step in an endless stream of epochs, int64 [batch].

  Unlike in `batch_indices`, an epoch's tail is part of the next batch, and a batch may be larger
  than the dataset: a few prompts can be sampled from repeatedly.
  """
  return stream_rows(num_rows, seed, np.arange(step * batch, (step + 1) * batch))


def stream_rows(num_rows: int, seed: int, position: np.ndarray) -> np.ndarray:
  """Returns the rows at positions of the endless stream of epochs, int64 [N].

  Args:
    num_rows: number of rows of the dataset.
    seed: seed of the order.
    position: integers from 0, in any order, [N].
  """
  epoch, row = np.divmod(position, num_rows)  # a batch may span several epochs
  orders = {e: _permutation(num_rows, seed, int(e)) for e in np.unique(epoch)}
  return np.array([orders[e][r] for e, r in zip(epoch, row, strict=True)], np.int64)


def eval_batches(num_rows: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
  """Yields every row once, in order, for evaluation.

  Yields:
    (indices [batch], number of real ones among them); the last batch repeats its last row.
  """
  for start in range(0, num_rows, batch):
    indices = np.arange(start, start + batch)  # a shorter batch would be another program
    yield np.minimum(indices, num_rows - 1), min(batch, num_rows - start)


# Cached: at every step, permuting all rows would cost more than gathering a batch.
@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  # Not seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1.
  return np.random.default_rng([seed, epoch]).permutation(num_rows)
