"""A decode step reads no larger a cache than it needs; timings are in `tools/bench.py`."""

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
  """(positions of the cache, of the longest active row) at each call of `decode_chunk`."""
  calls, decode_chunk = [], decode.decode_chunk

  def record(weights, slots, *, decoder):
    longest = int(np.max(slots.length, where=np.asarray(slots.active), initial=0))
    (positions,) = {layer.key.shape[-1] for layer in slots.cache}
    calls.append((positions, longest))
    return decode_chunk(weights, slots, decoder=decoder)

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
  """The cache grows with a long prompt and a long response, and shrinks after them."""
  limits = np.array([20, 64, 10, 30, 20, 33])
  _run(limits, 64)
  short = list(chunks)
  for positions, longest in short:
    assert longest + CHUNK <= positions <= max(2 * (longest + CHUNK), 64)
  assert {64, 128, 256} == {positions for positions, _ in short}
  assert short[0][0] == short[-1][0] == 64
  chunks.clear()
  _run(limits, 512)  # room for more, which no response needs
  assert chunks == short
