"""Continuous batching: a finished response's row and pages go to the next one that waits.

The host's part of decoding: which response is in which row, which pages it has, what is read next.
It creates no device arrays; the programs are called through `Programs`.
"""

import abc
import collections
import dataclasses

import numpy as np

from segjax.model import decode_sizes
from segjax.model.decode import ChunkOutput, DecodeConfig, DecodeRows, empty_rows
from segjax.model.decode_cache import PrefillChunk
from segjax.model.decode_sizes import PoolSize
from segjax.model.page_pool import PagePool
from segjax.model.prefill_chunks import Read, prefill_chunks
from segjax.model.requests import Partial, Request, start_result


class Programs(abc.ABC):
  """The programs on the devices, which hold the pages."""

  @abc.abstractmethod
  def prefill(self, chunk: PrefillChunk) -> None:
    """Writes keys and values of a chunk of prompts; see `decode.prefill`."""

  @abc.abstractmethod
  def copy_pages(self, copies: list[list[tuple[int, int]]]) -> None:
    """Copies pages, (source, target) for each group of rows."""

  @abc.abstractmethod
  def decode(self, rows: DecodeRows, steps: int) -> ChunkOutput:
    """Samples a chunk of tokens, returned on the host; see `decode.decode_chunk`."""


@dataclasses.dataclass
class _Live:
  """A response that is decoded: its request and its pages."""

  request: int
  pages: list[int]


class _Group:
  """A group of rows, with pages of its own.

  Attributes:
    live: responses that are decoded, in the order in which they started.
    prefixes: pages of the prompts of which other samples wait, by number of the prompt.
    reads: prompts to read before the next chunk of steps.
    copies: pages to copy after that.
  """

  def __init__(self, num_pages: int):
    self.pool = PagePool(num_pages)
    self.live: list[_Live] = []
    self.prefixes: dict[int, list[int]] = {}
    self.reads: list[Read] = []
    self.copies: list[tuple[int, int]] = []

  def drop_prefixes(self, prompts: list[int] | None = None) -> None:
    """Gives up the pages of these prompts, or of all; live responses keep theirs."""
    for prompt in list(self.prefixes) if prompts is None else prompts:
      self.pool.release(self.prefixes.pop(prompt, []))


class Scheduler:
  """Assigns responses to rows and pages, and collects their tokens.

  Args:
    requests: the responses, in the order in which they start.
    programs: of the devices.
    size: of the pools of pages, see `decode_sizes.plan_pool`.
    groups: of rows.
    decoder: the static configuration.
  """

  def __init__(
    self,
    requests: list[Request],
    programs: Programs,
    size: PoolSize,
    groups: int,
    decoder: DecodeConfig,
  ):
    self._requests, self._programs, self._decoder = requests, programs, decoder
    self._columns = size.columns
    self._max_live = size.slots // groups  # of a group
    self._groups = [_Group(size.pages) for _ in range(groups)]
    self._waiting = collections.deque(range(len(requests)))
    # Requests of each prompt that have not started.
    self._siblings = collections.Counter(r.prompt for r in requests if not len(r.response.ids))
    self._prompt_length = np.array([len(r.prompt_ids) for r in requests])
    self._limit = np.array([r.limit for r in requests])
    self._count = np.array([len(r.response.ids) for r in requests])  # tokens of each response
    tokens = int((self._prompt_length + self._count).sum())
    self._prefill_size = decode_sizes.prefill_size(tokens, groups, decoder)
    self.is_done = np.zeros(len(requests), bool)  # finished, or at the limit
    self.result = start_result(requests, decoder.sampling.max_new_tokens, decoder.stop_ids[0])

  @property
  def num_done(self) -> int:
    """Number of responses that are finished or at their limit."""
    return int(self.is_done.sum())

  @property
  def is_busy(self) -> bool:
    """Whether a response is unfinished."""
    return not self.is_done.all()

  def unfinished(self) -> list[Request]:
    """Returns the requests that are not done, with the tokens that they have."""
    return [self._so_far(int(i)) for i in np.flatnonzero(~self.is_done)]

  def _so_far(self, index: int) -> Request:
    tokens = slice(0, self._count[index])
    arrays = (self.result.response_ids, self.result.logprob, self.result.sample_logprob)
    response = Partial(*(x[index, tokens].copy() for x in arrays))
    return dataclasses.replace(self._requests[index], response=response)

  def refill(self) -> None:
    """Starts waiting responses where there are rows and pages for them, and reads their prompts."""
    while self._waiting:
      index = self._waiting[0]
      group = self._group_for(index)
      if group is None and not any(group.live for group in self._groups):
        # Nothing ends that would free pages but those of prompts, which are read again.
        for each in self._groups:
          each.drop_prefixes()
        group = self._group_for(index)
      if group is None:
        break
      self._waiting.popleft()
      self._start(index, group)
    reads = [group.reads for group in self._groups]
    for chunk in prefill_chunks(reads, self._columns, self._prefill_size):
      self._programs.prefill(chunk)
    # After the prompts are read: a copied page may belong to one of them.
    self._copy_pages()
    for group in self._groups:
      group.reads = []
      # Not sooner: until it is copied, a page must not go to another row.
      group.drop_prefixes([prompt for prompt in group.prefixes if not self._siblings[prompt]])

  def _group_for(self, index: int) -> _Group | None:
    """Returns the group that the response starts in; None if no group has room."""
    # A response that goes on reads its prompt again, with the tokens that it has.
    prompt = self._requests[index].prompt if not self._count[index] else None

    def has_room(group):
      shared = len(group.prefixes.get(prompt, ()))
      needed = self._pages_needed(index) - max(shared - 1, 0)
      # Each live response takes a page from time to time: without these it would soon be stopped
      # for the sake of the new one.
      reserve = len(group.live) * self._decoder.chunk // self._decoder.page_size
      return len(group.live) < self._max_live and needed + reserve <= group.pool.num_free

    groups = [group for group in self._groups if has_room(group)]
    # One that has the prompt's pages first, then the emptiest.
    return min(groups, key=lambda g: (prompt not in g.prefixes, len(g.live)), default=None)

  def _pages_needed(self, index: int) -> int:
    """Returns how many pages a response has at the end of the next chunk of steps."""
    count = self._count[index]
    tokens = self._prompt_length[index] + count - 1  # all but the last are in pages
    steps = min(self._decoder.chunk, self._limit[index] - count)
    return -(-int(tokens + steps) // self._decoder.page_size)

  def _start(self, index: int, group: _Group) -> None:
    request, pool = self._requests[index], group.pool
    count = self._count[index]
    ids = np.concatenate([request.prompt_ids, self.result.response_ids[index, :count]])[:-1]
    whole, rest = divmod(len(ids), self._decoder.page_size)
    prefix = group.prefixes.get(request.prompt) if not count else None
    if prefix is None:
      pages = pool.allocate(whole + bool(rest))
      if len(ids):
        group.reads.append(Read(ids, pages))
    else:
      # Pages that are full of the prompt are shared; into the last one each sample writes.
      pages = prefix[:whole]
      pool.share(pages)
      if rest:
        pages += pool.allocate(1)
        group.copies.append((prefix[whole], pages[whole]))
    group.live.append(_Live(index, pages))
    if count:
      return
    self._siblings[request.prompt] -= 1
    if prefix is None:
      group.prefixes[request.prompt] = list(pages)
      pool.share(pages)

  def step(self) -> None:
    """Decodes a chunk of tokens for every live response, and frees the rows of those that end."""
    for group in self._groups:
      self._reserve(group)
    size = decode_sizes.chunk_rows(
      max(len(group.live) for group in self._groups), self._max_live, self._decoder
    )
    live = [
      (g * size + i, each)
      for g, group in enumerate(self._groups)
      for i, each in enumerate(group.live)
    ]
    row, index = (np.array(x) for x in zip(*((r, each.request) for r, each in live), strict=True))
    rows = self._rows(live, row, index, size * len(self._groups))
    steps = int(min(self._decoder.chunk, (self._limit - self._count)[index].max()))
    output = self._programs.decode(rows, steps)
    self._record(output, row, index)
    for group in self._groups:
      self._release_done(group)
    self._copy_pages()

  def _release_done(self, group: _Group) -> None:
    """Frees the pages of responses that are done."""
    done = [each for each in group.live if self.is_done[each.request]]
    group.live = [each for each in group.live if not self.is_done[each.request]]
    for each in done:
      group.pool.release(each.pages)
    # Pages with NaN would reach the next row that has them, since 0 times NaN is NaN: page 0, which
    # is zeros, is copied onto them. Other samples of the prompt end in the same chunk, or read the
    # prompt again.
    broken = [each for each in done if self.result.non_finite[each.request]]
    for each in broken:
      group.drop_prefixes([self._requests[each.request].prompt])
    pages = {page for each in broken for page in each.pages}
    group.copies += [(0, page) for page in sorted(pages) if group.pool.is_free(page)]

  def _copy_pages(self) -> None:
    if any(group.copies for group in self._groups):
      self._programs.copy_pages([group.copies for group in self._groups])
    for group in self._groups:
      group.copies = []

  def _reserve(self, group: _Group) -> None:
    """Gives each live response the pages of the next chunk; the youngest wait if there are none."""
    position = 0
    while position < len(group.live):
      each = group.live[position]
      missing = self._pages_needed(each.request) - len(each.pages)
      if missing <= group.pool.num_free:
        each.pages += group.pool.allocate(max(missing, 0))
        position += 1
      elif group.prefixes:
        group.drop_prefixes()
      else:
        # It keeps its tokens, and reads them again later: nothing else changes, since its random
        # numbers depend on no row. The oldest always goes on.
        youngest = group.live.pop()
        group.pool.release(youngest.pages)
        self._waiting.appendleft(youngest.request)
        if not self._count[youngest.request]:
          self._siblings[self._requests[youngest.request].prompt] += 1

  def _rows(self, live, row: np.ndarray, index: np.ndarray, size: int) -> DecodeRows:
    """Returns the arguments of a chunk for the live responses `index` in the rows `row`."""
    pages = max(len(each.pages) for _, each in live)
    columns = decode_sizes.table_columns(pages, self._columns, self._decoder)
    rows = empty_rows(size, columns)
    for i, each in live:
      rows.table[i, : len(each.pages)] = each.pages
    count = self._count[index]
    rows.token[row] = [self._last_token(int(i)) for i in index]
    rows.position[row] = self._prompt_length[index] + count - 1
    rows.count[row] = count
    rows.limit[row] = self._limit[index]
    rows.number[row] = [self._requests[i].number for i in index]
    rows.active[row] = True
    return rows

  def _last_token(self, index: int) -> int:
    count = self._count[index]
    ids = self.result.response_ids[index, :count] if count else self._requests[index].prompt_ids
    return int(ids[-1])

  def _record(self, output: ChunkOutput, row: np.ndarray, index: np.ndarray) -> None:
    """Copies the tokens of a chunk from rows to responses."""
    count = output.count[row]
    step = np.arange(output.ids.shape[1])
    is_real = step < count[:, None]
    response = np.broadcast_to(index[:, None], is_real.shape)[is_real]
    column = (self._count[index][:, None] + step)[is_real]
    self.result.response_mask[response, column] = True
    for name, values in (
      ('response_ids', output.ids),
      ('logprob', output.logprob),
      ('sample_logprob', output.sample_logprob),
    ):
      getattr(self.result, name)[response, column] = values[row][is_real]
    self.result.finished[index] = output.finished[row]
    self.result.non_finite[index] = output.non_finite[row]
    self._count[index] += count
    ended = output.finished[row] | output.non_finite[row]
    self.is_done[index] = ended | (self._count[index] >= self._limit[index])
