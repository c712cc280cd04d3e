"""The weights of the decode loop: which of them are copies."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import models

from segjax.model.decode_weights import decode_weights, runs_unrolled
from segjax.model.generate import make_decode_config
from segjax.model.sampling import Sampling


def test_layers_are_unrolled_where_a_scan_costs_more():
  assert runs_unrolled('gpu', 80) and not runs_unrolled('tpu', 2)
  assert runs_unrolled('cpu', 30) and not runs_unrolled('cpu', 80)


@pytest.mark.parametrize('unrolled', [True, False])
@pytest.mark.parametrize('name', models.CONFIGS)
@pytest.mark.parametrize('devices', [1, 8])
def test_only_what_changes_is_copied(name, unrolled, devices):
  """One device, no cast: the parameters themselves, but for slices and a transposed head."""
  mesh, config = models.mesh(devices), models.CONFIGS[name]
  decoder = make_decode_config(config, Sampling(), models.STOP_IDS, mesh)
  decoder = dataclasses.replace(decoder, unrolled=unrolled)
  with jax.set_mesh(mesh):
    params = models.place(models.params(config), mesh)
    weights = decode_weights(params, decoder=decoder)
  backbone = params['backbone']
  tied = config.tie_word_embeddings
  head = backbone['embedding'].T if tied else params['lm_head']['kernel']
  np.testing.assert_array_equal(weights.head, head)
  np.testing.assert_array_equal(weights.embedding, backbone['embedding'])
  is_kept = devices == 1
  assert (weights.embedding is backbone['embedding']) == is_kept
  assert (weights.norm['scale'] is backbone['norm']['scale']) == is_kept
  assert (weights.head is head) == (is_kept and not tied)
  if unrolled:
    assert len(weights.layers) == config.num_hidden_layers
    layers = [layer['params'] for layer in weights.layers]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
  else:
    stacked = weights.layers['params']
    same = [
      a is b for a, b in zip(*map(jax.tree.leaves, (stacked, backbone['layers'])), strict=True)
    ]
    assert set(same) == {is_kept}
  jax.tree.map(np.testing.assert_array_equal, stacked, backbone['layers'])


def test_a_cast_copies():
  config = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  decoder = make_decode_config(config, Sampling(), models.STOP_IDS, models.mesh(1))
  params = models.params(config)
  weights = decode_weights(params, decoder=decoder)
  assert weights.embedding.dtype == weights.head.dtype == 'bfloat16'
  assert weights.norm['scale'] is params['backbone']['norm']['scale']
