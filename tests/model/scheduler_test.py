"""Continuous batching on the host; the programs are replaced by what they do to pages."""

import collections
import dataclasses

import numpy as np
import pytest
from fixtures import models

from segjax.model import decode, decode_sizes, scheduler
from segjax.model.decode_sizes import PoolSize
from segjax.model.generate import make_decode_config
from segjax.model.requests import Partial, Request
from segjax.model.sampling import Sampling

LIMIT = 40
PAGE = 4
STOP = models.STOP_IDS[0]


def token(prompt, position):
  """The token that a prompt's response has at a position of the sequence."""
  return 10 + (7 * prompt + position) % 50


class Programs(scheduler.Programs):
  """Keeps which (prompt, position) each page entry holds, and checks that rows read their own."""

  def __init__(self, groups, lengths, chunk, non_finite=()):
    self.pages = [collections.defaultdict(dict) for _ in range(groups)]
    self.lengths, self.chunk, self.non_finite = lengths, chunk, non_finite
    self.reads = self.used = self.rows = self.read_tokens = 0
    self.calls = collections.Counter()
    self.cleaned, self.columns = [], []

  def prefill(self, chunk):
    self.calls['prefill', chunk.ids.shape] += 1
    for group in range(len(self.pages)):
      rows = chunk.rows
      assert rows.count[group] == rows.segment[group].max()
      for i, (segment, position) in enumerate(
        zip(rows.segment[group], chunk.position[group], strict=True)
      ):
        if segment:
          page = rows.table[group, segment - 1][position // PAGE]
          assert page > 0
          self.pages[group][page][position % PAGE] = int(chunk.ids[group, i])
          self.read_tokens += 1
      starts = chunk.position[group, rows.start[group, : rows.count[group]]]
      assert (starts[1:] == 0).all()  # only the first row has a prefix

  def copy_pages(self, copies):
    for pages, pairs in zip(self.pages, copies, strict=True):
      for source, target in pairs:
        pages[target] = dict(pages[source])
        if source == 0:
          self.cleaned.append(target)

  def decode(self, rows, steps):
    self.calls['decode', rows.table.shape] += 1
    longest = int(np.max(rows.position, where=rows.active, initial=0)) + 1
    self.columns.append((rows.table.shape[1], longest))
    size = len(rows.token)
    ids = np.full((size, self.chunk), STOP, np.int32)
    logprob = np.zeros((size, self.chunk), np.float32)
    count, finished = np.zeros(size, np.int32), np.zeros(size, bool)
    non_finite = np.zeros(size, bool)
    per_group = size // len(self.pages)
    for row in np.flatnonzero(rows.active):
      pages, prompt = self.pages[row // per_group], int(rows.number[row, 0])
      last, current = int(rows.position[row]), int(rows.token[row])
      for step in range(steps):
        self.rows += 1
        pages[rows.table[row, last // PAGE]][last % PAGE] = current
        held = [pages[rows.table[row, p // PAGE]].get(p % PAGE) for p in range(last + 1)]
        assert held == self.sequence(prompt, last + 1)
        self.reads += last + 1
        if prompt in self.non_finite and rows.count[row] + step == 3:
          non_finite[row] = True
          break
        last += 1
        current = token(prompt, last)
        done = rows.count[row] + step + 1 >= self.lengths[prompt]
        current = STOP if done else current
        ids[row, step], logprob[row, step] = current, -last
        count[row] += 1
        if done or rows.count[row] + step + 1 >= rows.limit[row]:
          finished[row] = done
          break
    self.used += steps * size
    return decode.ChunkOutput(ids, logprob, logprob - 1, count, finished, non_finite)

  def sequence(self, prompt, length):
    return [token(prompt, p) for p in range(length)]


def requests(prompt_lengths, samples=1):
  return [
    Request(
      np.array([token(i, p) for p in range(n)], np.int32), i, np.array([i, s], np.uint32), LIMIT
    )
    for i, n in enumerate(prompt_lengths)
    for s in range(samples)
  ]


def decoder(chunk=8):
  sampling = Sampling(max_new_tokens=LIMIT)
  config = make_decode_config(models.CONFIG, sampling, models.STOP_IDS, models.mesh(1), chunk)
  return dataclasses.replace(config, page_size=PAGE)


def run(asked, lengths, size, groups=1, enough=None, **values):
  config = decoder()
  programs = Programs(groups, lengths, config.chunk, **values)
  run = scheduler.Scheduler(asked, programs, size, groups, config)
  while run.is_busy and (enough is None or run.num_done < enough):
    run.refill()
    run.step()
  return run, programs


LENGTHS = np.random.default_rng(0).integers(1, LIMIT + 1, 24)
PROMPTS = np.random.default_rng(1).integers(1, 30, 24)
COLUMNS = -(-(30 + LIMIT) // PAGE)


@pytest.mark.parametrize('samples', [1, 3])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(('slots', 'pages'), [(6, 200), (24, 60), (2, 1 + COLUMNS), (24, 30)])
def test_every_response_is_complete(slots, pages, groups, samples):
  """However few rows and pages there are: some responses wait, or give their pages back."""
  result, _ = run(requests(PROMPTS, samples), LENGTHS, PoolSize(slots, pages, COLUMNS), groups)
  for i, n in enumerate(np.repeat(LENGTHS, samples)):
    start = PROMPTS[i // samples]
    expected = [token(i // samples, start + t) for t in range(n - 1)] + [STOP]
    assert result.result.response_ids[i, :n].tolist() == expected
    assert result.result.response_mask[i].sum() == n and result.result.finished[i]
    np.testing.assert_array_equal(result.result.logprob[i, :n], -start - np.arange(n))
  assert set(result._siblings.values()) == {0}
  for group in result._groups:
    assert group.pool.num_free == pages - 1 and not group.prefixes


@pytest.mark.parametrize('seed', range(8))
def test_no_pool_is_too_small_for_one_response(seed):
  """Random lengths, samples and groups, in pools that hold little more than the longest row."""
  rng = np.random.default_rng(seed)
  prompts = rng.integers(1, 30, rng.integers(1, 8))
  lengths = rng.integers(1, LIMIT + 1, len(prompts))
  samples, groups = rng.integers(1, 6), rng.integers(1, 4)
  size = PoolSize(int(groups * rng.integers(1, 7)), COLUMNS + int(rng.integers(2, 9)), COLUMNS)
  result, _ = run(requests(prompts, samples), lengths, size, int(groups))
  np.testing.assert_array_equal(
    result.result.response_mask.sum(axis=1), np.repeat(lengths, samples)
  )


def test_samples_share_the_pages_of_a_prompt():
  """The prompt is read once, and its full pages are held once."""
  _, alone = run(requests([29]), np.array([9]), PoolSize(1, 200, COLUMNS))
  _, shared = run(requests([29], samples=8), np.array([9]), PoolSize(8, 200, COLUMNS))
  assert shared.read_tokens == alone.read_tokens == 28
  # 7 full pages, and per sample the positions of its response.
  assert len(shared.pages[0]) <= 7 + 8 * 3
  result, _ = run(requests([29], samples=8), np.array([9]), PoolSize(8, 7 + 8 * 3 + 1, COLUMNS))
  assert result.num_done == 8


def test_pages_with_nan_are_cleaned():
  """All pages of a row that overflows are zeros again before another row has them."""
  result, programs = run(
    requests([9, 5, 9], samples=2), np.array([8, 8, 8]), PoolSize(2, 12, COLUMNS), non_finite=(0,)
  )
  assert result.result.non_finite.tolist() == [True, True, False, False, False, False]
  assert len(set(programs.cleaned)) >= 3  # of the prompt, and what the two samples wrote
  assert result.result.finished[2:].all()


def test_unfinished_requests_go_on_later():
  """What two generations return together is what one returns."""
  size = PoolSize(6, 100, COLUMNS)
  whole, _ = run(requests(PROMPTS), LENGTHS, size)
  first, _ = run(requests(PROMPTS), LENGTHS, size, enough=10)
  rest = first.unfinished()
  assert 10 <= first.num_done == len(PROMPTS) - len(rest)
  assert any(len(r.response.ids) > 0 for r in rest) and any(not len(r.response.ids) for r in rest)
  second, _ = run(rest, LENGTHS, size)
  done = np.flatnonzero(first.is_done)
  waiting = np.flatnonzero(~first.is_done)
  for name in ('response_ids', 'logprob', 'sample_logprob', 'response_mask', 'finished'):
    expected = getattr(whole.result, name)
    np.testing.assert_array_equal(getattr(first.result, name)[done], expected[done])
    np.testing.assert_array_equal(getattr(second.result, name), expected[waiting])


def test_a_partial_response_keeps_its_log_probs():
  asked = requests([5])[0]
  drawn = [token(0, 5), token(0, 6)]
  partial = Partial(np.array(drawn, np.int32), *(np.full(2, x, np.float32) for x in (0.5, 0.25)))
  asked = dataclasses.replace(asked, response=partial)
  result, _ = run([asked], np.array([4]), PoolSize(1, 30, COLUMNS))
  assert result.result.response_ids[0, :4].tolist() == [*drawn, token(0, 7), STOP]
  assert result.result.logprob[0, :4].tolist() == [0.5, 0.5, -7, -8]
  assert result.result.sample_logprob[0, :4].tolist() == [0.25, 0.25, -8, -9]


def test_columns_follow_the_longest_row():
  """Where all columns are read, the table gets longer with a long row, and shorter after it."""
  prompts, lengths = np.array([3, 5, 29, 4, 3, 3]), np.array([10, 3, 40, 8, 9, 30])
  result, programs = run(requests(prompts), lengths, PoolSize(2, 60, COLUMNS))
  shapes = [shape for name, shape in programs.calls if name == 'decode']
  assert {columns for _, columns in shapes} == {4, 8, 16, 18}
  assert result.num_done == len(prompts)
  for columns, longest in programs.columns:
    assert longest <= columns * PAGE < max(2 * (longest + 8), PAGE + 1) or columns == COLUMNS


class Counts(scheduler.Programs):
  """Gives responses their lengths, and counts rows and positions as a kernel reads them."""

  def __init__(self, lengths, page):
    self.lengths, self.page = lengths, page
    self.needed = self.read = self.used = self.slots = 0
    self.shapes = set()
    self.run = None

  def prefill(self, chunk):
    self.shapes.add(('prefill', chunk.ids.shape, chunk.rows.table.shape))

  def copy_pages(self, copies):
    self.shapes.add('copy')

  def decode(self, rows, steps):
    self.shapes.add(('decode', rows.table.shape))
    left = np.where(rows.active, self.lengths[rows.number[:, 0]] - rows.count, 0)
    count = np.minimum(left, steps)
    for step in range(steps):
      length = np.where(step < count, rows.position + step + 1, 0)
      self.needed += length.sum()
      # Whole pages, and one of each row that is free or done.
      self.read += np.maximum(-(-length // self.page), 1).sum() * self.page
    if self.run._waiting:
      self.used += count.sum()
      self.slots += steps * len(count)
    ids = np.ones((len(count), steps), np.int32)
    logprob, none = np.zeros(ids.shape, np.float32), np.zeros(len(count), bool)
    return decode.ChunkOutput(ids, logprob, logprob, count, rows.active & (count == left), none)


@pytest.mark.parametrize('slots', [pytest.param(128, marks=pytest.mark.campaign), 256])
def test_rows_are_full_and_positions_are_read_once(slots):
  """Lengths as those of chat data: prompts of 179 tokens on average, responses of 403."""
  rng, count = np.random.default_rng(0), 1024
  prompts = np.clip(rng.lognormal(np.log(130), 0.9, count), 20, 1024).astype(int)
  lengths = np.clip(rng.lognormal(np.log(330), 0.7, count), 5, 1024).astype(int)
  sampling = Sampling(max_new_tokens=1024)
  config = make_decode_config(models.CONFIG, sampling, models.STOP_IDS, models.mesh(1))
  config = dataclasses.replace(config, paged_attention='triton')
  asked = [
    Request(np.ones(n, np.int32), i, np.array([i, 0], np.uint32), 1024)
    for i, n in enumerate(prompts)
  ]
  programs = Counts(lengths, config.page_size)
  size = decode_sizes.full_pool(slots, 1, 1024, config)
  # Half of the pages that all rows have at full length are more than these ever need.
  size = size._replace(pages=size.pages // 2)
  programs.run = run = scheduler.Scheduler(asked, programs, size, 1, config)
  while run.is_busy:
    run.refill()
    run.step()
  np.testing.assert_array_equal(run.result.response_mask.sum(axis=1), lengths)
  assert programs.used > 0.95 * programs.slots
  assert programs.read < 1.15 * programs.needed
  assert len(programs.shapes) <= 3  # programs, whatever the lengths
