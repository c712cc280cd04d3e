"""Datasets of token ids, the batches gathered from them, and the order in which they come.

Nothing is tokenised or cut here: that is `segjax.data.tokenize`. Order has no state:
`batch_indices` finds the rows of any step from (seed, step) alone, so a run resumes by one integer.

Every dataset pads on the right to ONE length, so that each step compiles once. `gather` makes
numpy arrays and hands each to `place`; a multi-host caller gives its own `place`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from segjax import types
from segjax.data.sources import Message, Rows, as_prompt
from segjax.errors import UserError

ToDevice = Callable[[np.ndarray], Any]
Dataset = TypeVar('Dataset', 'Conversations', 'Pairs', 'Prompts')


class TokenBatch(NamedTuple):
  """Conversations: ids int32 [B, S]; mask bool [B, S], True on the tokens to imitate."""

  ids: jax.Array
  mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of unequal length in one flat array; row i is values[offsets[i]:offsets[i + 1]]."""

  values: np.ndarray
  offsets: np.ndarray

  @classmethod
  def from_rows(cls, rows: Sequence[Any], dtype: Any) -> 'Ragged':
    """Joins rows end to end."""
    arrays = [np.asarray(row, dtype) for row in rows]
    lengths = [len(row) for row in arrays]
    return cls(np.concatenate([np.zeros(0, dtype), *arrays]), np.cumsum([0, *lengths]))

  def __getitem__(self, index: SupportsIndex) -> np.ndarray:
    return self.values[self.offsets[:-1][index] : self.offsets[1:][index]]

  def take(self, indices: np.ndarray) -> 'Ragged':
    """The rows at `indices`, in that order."""
    return Ragged.from_rows([self[i] for i in indices], self.values.dtype)

  def lengths(self, indices: np.ndarray) -> np.ndarray:
    """How long each of the rows is, [B]."""
    return (self.offsets[1:] - self.offsets[:-1])[indices]

  def pad(self, indices: np.ndarray, length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows padded on the right [B, length], how long each is [B])."""
    lengths = self.lengths(indices)
    position = np.arange(length)
    is_real = position < lengths[:, None]
    at = np.where(is_real, self.offsets[:-1][indices][:, None] + position, 0)
    return np.where(is_real, self.values[at], fill).astype(self.values.dtype), lengths


@dataclasses.dataclass(frozen=True)
class Conversations:
  """Tokenised conversations; `trained` marks the assistant's tokens."""

  tokens: Ragged
  trained: Ragged
  group: np.ndarray
  length: int
  pad_id: int
  counts: dict[str, int]

  def __len__(self) -> int:
    return len(self.group)

  def gather(self, indices: np.ndarray, place: ToDevice = jnp.asarray) -> TokenBatch:
    """The rows at `indices` [B], each array handed to `place`."""
    ids, _ = self.tokens.pad(indices, self.length, self.pad_id)
    mask, _ = self.trained.pad(indices, self.length, False)
    return TokenBatch(place(ids), place(mask))


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Tokenised preferences, each side prompt and response together; `row` is the source's.

  `rating_gap` is float32 [N], chosen less rejected, NaN where a row has no ratings. `truncated` is
  bool [N]: which pairs were cut. The entropies, if there are any, are those of the tokens under the
  reference, in nats.
  """

  chosen: Ragged
  rejected: Ragged
  chosen_finished: np.ndarray
  rejected_finished: np.ndarray
  prompt_length: np.ndarray
  rating_gap: np.ndarray
  row: np.ndarray
  group: np.ndarray
  length: int
  pad_id: int
  counts: dict[str, int]
  truncated: np.ndarray | None = None
  chosen_entropy: Ragged | None = None
  rejected_entropy: Ragged | None = None

  def __len__(self) -> int:
    return len(self.group)

  def gather(self, indices: np.ndarray, place: ToDevice = jnp.asarray) -> types.PreferenceBatch:
    """The pairs at `indices` [B], both sides [B, S], each array handed to `place`.

    `rating_gap` is None, and nothing is placed for it, where no row of the dataset has ratings.
    """

    def side(tokens: Ragged, finished: np.ndarray, entropy: Ragged | None) -> types.Sequences:
      ids, lengths = tokens.pad(indices, self.length, self.pad_id)
      position = np.arange(self.length)
      is_response = position >= self.prompt_length[indices][:, None]
      mask = is_response & (position < lengths[:, None])
      known = None if entropy is None else place(entropy.pad(indices, self.length, 0)[0])
      return types.Sequences(place(ids), place(mask), place(finished[indices]), known)

    chosen = side(self.chosen, self.chosen_finished, self.chosen_entropy)
    rejected = side(self.rejected, self.rejected_finished, self.rejected_entropy)
    has_ratings = not np.isnan(self.rating_gap).all()
    return types.PreferenceBatch(
      chosen, rejected, place(self.rating_gap[indices]) if has_ratings else None
    )


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Tokenised prompts; `row` is where each stands in `source`."""

  tokens: Ragged
  row: np.ndarray
  source: Rows
  group: np.ndarray
  length: int
  pad_id: int
  counts: dict[str, int]

  def __len__(self) -> int:
    return len(self.group)

  def gather(self, indices: np.ndarray, place: ToDevice = jnp.asarray) -> types.PromptBatch:
    """The prompts at `indices` [B], each array handed to `place`."""
    ids, lengths = self.tokens.pad(indices, self.length, self.pad_id)
    return types.PromptBatch(place(ids), place(lengths.astype(np.int32)))

  def messages(self, index: SupportsIndex) -> list[Message]:
    """The prompt as it was written, uncut, for display."""
    row = int(self.row[index])
    return as_prompt(self.source[row], self.source.where(row))


def split_holdout(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
  """Splits by prompt: rows of one prompt never stand on both sides.

  Which prompts are held out depends on the prompts and the seed, not on the order of the rows.
  Both sides keep the dataset's length (one compile) and its counts.

  Args:
    dataset: what an `encode_` function gave.
    fraction: the held-out share of the rows, met or passed by less than one prompt; 0 holds out
      none.
    seed: of the choice.

  Returns:
    (kept, held out), each in the order of the dataset.

  Raises:
    ValueError: the fraction is not in [0, 1), or leaves one side without a prompt.
  """
  if not 0 <= fraction < 1:
    raise UserError(f'holdout={fraction} must be at least 0 and below 1.')
  prompts, prompt_of_row, num_rows = np.unique(
    dataset.group, return_inverse=True, return_counts=True
  )
  order = np.random.default_rng(seed).permutation(len(prompts))
  before = np.cumsum(num_rows[order]) - num_rows[order]
  held = order[before < fraction * len(dataset)]
  if len(held) == len(prompts):
    raise UserError(
      f'holdout={fraction} of {len(prompts)} distinct prompts leaves none to train on; give '
      'more data or a smaller share.'
    )
  is_held = np.isin(prompt_of_row, held)
  return select(dataset, np.flatnonzero(~is_held)), select(dataset, np.flatnonzero(is_held))


def select(dataset: Dataset, indices: np.ndarray) -> Dataset:
  """The dataset of the rows at `indices`, in that order."""
  fields = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
  taken = {k: v.take(indices) for k, v in fields.items() if isinstance(v, Ragged | np.ndarray)}
  return dataclasses.replace(dataset, **taken)


def batch_indices(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
  """The rows of one training step: int64 [batch].

  Each epoch is a permutation by (seed, epoch) cut into whole batches; only its tail, less than a
  batch, is left out. Nothing is remembered between steps.

  Args:
    num_rows: of the dataset.
    batch: rows a step.
    seed: of the order.
    step: 0-based, over all epochs.

  Raises:
    ValueError: a batch is larger than the dataset.
  """
  if not 0 < batch <= num_rows:
    raise UserError(
      f'a batch of {batch} rows cannot be drawn from {num_rows} rows; use a batch of 1 to '
      f'{num_rows}, or more data.'
    )
  epoch, position = divmod(step, num_rows // batch)
  return _permutation(num_rows, seed, epoch)[position * batch : (position + 1) * batch].copy()


def endless_batch_indices(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
  """The rows of one step out of an endless stream of epochs: int64 [batch].

  As `batch_indices`, but an epoch's tail goes into the next batch, and a batch may be larger than
  the dataset: prompts are few and sampled from again.
  """
  position = np.arange(step * batch, (step + 1) * batch)
  epoch, row = np.divmod(position, num_rows)
  orders = {e: _permutation(num_rows, seed, int(e)) for e in np.unique(epoch)}
  return np.array([orders[e][r] for e, r in zip(epoch, row, strict=True)])


def eval_batches(num_rows: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
  """Every row once, in order, for evaluation.

  Yields:
    (indices [batch], how many of them are real); the last chunk repeats its last row to be full.
  """
  for start in range(0, num_rows, batch):
    indices = np.arange(start, start + batch)
    yield np.minimum(indices, num_rows - 1), min(batch, num_rows - start)


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(num_rows)
