"""A chunk of steps reads no more rows and pages than it needs; timings are in `tools/bench.py`."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import models

from segjax.model import decode
from segjax.model.generate import GenerationOptions, generate, make_decode_config
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

LENGTHS = np.array([8, 5, 8, 3, 150, 7], np.int32)
CHUNK = 16


@pytest.fixture
def chunks(monkeypatch):
  """(positions of the table, of the longest active row) at each call of `decode_chunk`."""
  calls, decode_chunk = [], decode.decode_chunk

  def record(weights, cache, rows, steps, *, decoder):
    longest = int(np.max(rows.position, where=rows.active, initial=0)) + 1
    calls.append((rows.table.shape[1] * decoder.page_size, longest))
    return decode_chunk(weights, cache, rows, steps, decoder=decoder)

  monkeypatch.setattr(decode, 'decode_chunk', record)
  return calls


def _run(limits, max_new_tokens):
  config = dataclasses.replace(models.CONFIG, max_position_embeddings=1024, num_hidden_layers=1)
  mesh = models.mesh(1)
  sampling = Sampling(min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens)
  generate(
    models.params(config),
    PromptBatch(models.ids(shape=(len(LENGTHS), LENGTHS.max())), LENGTHS),
    jax.random.key(0),
    decoder=make_decode_config(config, sampling, models.STOP_IDS, mesh, chunk=CHUNK),
    mesh=mesh,
    options=GenerationOptions(max_concurrent=2, limits=limits),
  )


def test_positions_follow_the_longest_row(chunks):
  """The table gets longer with a long prompt and a long response, and shorter after them."""
  limits = np.array([20, 64, 10, 30, 20, 33])
  _run(limits, 64)
  short = list(chunks)
  for positions, longest in short:
    assert longest <= positions < max(2 * (longest + CHUNK), 65)
  assert {64, 128, 256} == {positions for positions, _ in short}
  assert short[0][0] == short[-1][0] == 64
  chunks.clear()
  _run(limits, 512)  # room for more, which no response needs
  assert chunks == short
