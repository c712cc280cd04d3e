"""Tokenizes chunks of rows in several processes, which import neither jax nor the user's script.

python -m segjax.data.token_workers reads pickles from its standard input, a form with a reading and
then chunks; it writes the tokenized chunks to its standard output.
"""

import collections
import contextlib
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from segjax.data.rows import Reading
from segjax.data.token_chunks import Chunk, TokenizedChunk, tokenize_chunk
from segjax.data.token_forms import Form

_MAX_WORKERS = 8  # each takes about 300 MB; this process reads rows as fast as more could tokenize
_CHUNKS_AHEAD = 2  # of each worker


def count_workers() -> int:
  """Returns the number of processes that tokenize: one for each core."""
  has_affinity = hasattr(os, 'sched_getaffinity')
  cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
  return min(cores, _MAX_WORKERS)


def tokenize_chunks(
  form: Form, chunks: Iterable[Chunk], reading: Reading, num_workers: int
) -> Iterator[TokenizedChunk]:
  """Yields the tokenized chunks in order; a few are read ahead.

  A chunk whose worker ends, as for lack of memory, is tokenized in this process.
  """
  setup = pickle.dumps((form, Reading(reading.columns, reading.drop_bad)))
  with contextlib.ExitStack() as stack:
    workers = [stack.enter_context(_worker(setup)) for _ in range(num_workers)]
    pool = stack.enter_context(ThreadPoolExecutor(num_workers))
    idle = collections.deque(workers)

    def tokenize(chunk: Chunk) -> TokenizedChunk:
      worker = idle.popleft()  # there are as many as threads
      try:
        pickle.dump(chunk, worker.stdin)
        worker.stdin.flush()
        return pickle.load(worker.stdout)
      except (OSError, EOFError, pickle.UnpicklingError):
        return tokenize_chunk(form, chunk, reading)
      finally:
        idle.append(worker)

    chunks = iter(chunks)
    ahead = itertools.islice(chunks, _CHUNKS_AHEAD * num_workers)
    pending = collections.deque(pool.submit(tokenize, chunk) for chunk in ahead)
    while pending:
      yield pending.popleft().result()
      pending.extend(pool.submit(tokenize, chunk) for chunk in itertools.islice(chunks, 1))


@contextlib.contextmanager
def _worker(setup: bytes) -> Iterator[subprocess.Popen]:
  """Yields a process that tokenizes chunks; ends it afterwards."""
  environment = {'PYTHONPATH': os.pathsep.join(sys.path), 'TOKENIZERS_PARALLELISM': 'false'}
  process = subprocess.Popen(
    [sys.executable, '-m', 'segjax.data.token_workers'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | environment,
  )
  try:
    with contextlib.suppress(OSError):  # one that ends at once
      process.stdin.write(setup)
    yield process
  finally:
    process.kill()  # it holds nothing
    with contextlib.suppress(OSError):
      process.communicate()


def _serve(requests: Any, results: Any) -> None:
  """Tokenizes chunks until there are no more."""
  form, reading = pickle.load(requests)
  with contextlib.suppress(EOFError):
    while True:
      pickle.dump(tokenize_chunk(form, pickle.load(requests), reading), results)
      results.flush()


if __name__ == '__main__':
  with os.fdopen(os.dup(1), 'wb') as output:
    os.dup2(2, 1)  # what a library prints is no result
    _serve(sys.stdin.buffer, output)
