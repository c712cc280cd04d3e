"""Lengths that a plan counts with, and the calls of a rollout that follow from them."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import models

from segjax.config.settings import Settings, replace
from segjax.model.decode_sizes import PoolSize
from segjax.model.generate import make_decode_config
from segjax.model.sampling import Sampling
from segjax.plan import update_calls
from segjax.plan.lengths import draw_lengths
from segjax.plan.rollout_counts import count_rollout


def test_lengths_as_those_of_ultrafeedback():
  texts = draw_lengths('ultrafeedback', 1024, 1024, 1024)
  assert [round(x.mean()) for x in (*texts, texts.total)] == [179, 403, 582]
  assert (texts.prompt.min(), texts.prompt.max()) == (20, 1024)
  assert texts.response.max() == 1024
  again = draw_lengths('ultrafeedback', 1024, 1024, 1024)
  assert np.array_equal(texts.total, again.total)
  samples = draw_lengths('ultrafeedback', 6, 1024, 1024, samples=3).prompt
  assert samples[0] == samples[2] != samples[3] == samples[5]
  assert set(draw_lengths('maximum', 3, 16, 8).total) == {24}


def count(texts, slots, limit=64, **options):
  config = dataclasses.replace(models.CONFIG, max_position_embeddings=2048)
  sampling = Sampling(max_new_tokens=limit)
  decoder = make_decode_config(config, sampling, models.STOP_IDS, models.mesh(1))
  decoder = dataclasses.replace(decoder, paged_attention='triton')
  columns = -(-(60 + limit) // 64)
  size = PoolSize(slots, slots * columns + 1, columns)
  return count_rollout(texts, decoder, size, groups=1, **options)


def test_chunks_of_a_rollout_are_those_of_its_rows():
  """The next response gets the row that ends first, at the end of a chunk of 16 steps."""
  texts = draw_lengths('ultrafeedback', 12, 60, 64)
  rows = [0, 0, 0, 0]
  for length in texts.response:
    first = rows.index(min(rows))
    rows[first] += -(-int(length) // 16)
  counts = count(texts, len(rows))
  assert counts.chunks == max(rows)
  positions = sum(
    p * n + n * (n - 1) / 2 for p, n in zip(texts.prompt, texts.response, strict=True)
  )
  assert counts.live == pytest.approx(positions / (counts.steps * len(rows)))
  assert counts.copies == 0
  # The samples of a prompt share its pages, but for the last one that is not full.
  assert count(draw_lengths('maximum', 12, 60, 64, 4), 4, samples=4).copies > 0


def test_carrying_fills_the_rows():
  texts = draw_lengths('ultrafeedback', 24, 60, 1024)
  waiting, carrying = count(texts, 16, 1024), count(texts, 16, 1024, carry=True)
  assert carrying.chunks < waiting.chunks and carrying.prefills > 0


def test_packed_updates_are_counted_by_their_pieces():
  s = replace(Settings(), **{'ppo.packing_length': 64, 'ppo.micro_batch_size': 4})
  mesh = models.mesh(1)
  batches = np.array([[64] * 8, [16] * 8])  # two pieces of four rows, and one half full
  arguments, calls = update_calls.update_calls(
    lambda p: (p,), s.ppo, batches, 64, mesh, models.CONFIG
  )
  assert (calls.number, calls.trips, calls.arguments) == (2, 2, None)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(arguments))


def test_memory_is_that_of_the_largest_pieces():
  """Pieces as large as the bound allows, and not those of any lengths that were drawn."""
  s = replace(Settings(), **{'ppo.packing_length': 64, 'ppo.micro_batch_tokens': 200})
  batches = np.full((2, 8), 40)
  (largest,), calls = update_calls.update_calls(
    lambda p: (p,), s.ppo, batches, 64, models.mesh(1), models.CONFIG
  )
  pieces = largest.pieces
  assert (pieces.sequence.shape, pieces.rows, pieces.width) == ((2, 8), 3, 64)
  (usual,) = calls.arguments
  assert calls.trips == len(usual.pieces.sequence)
  assert usual.pieces.rows * usual.pieces.width <= 200
