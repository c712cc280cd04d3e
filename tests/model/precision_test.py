"""Parameters that stay in float32, wherever a network is stored in bfloat16."""

import dataclasses

import jax
import pytest
from fixtures import models

from segjax.config.settings import Optimizer, Runtime, Settings
from segjax.model import sharding
from segjax.model.decode_weights import decode_weights
from segjax.model.generate import make_decode_config
from segjax.model.precision import stored_dtype
from segjax.model.sampling import Sampling
from segjax.plan import abstract_arrays


def paths(params):
  return [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def float32_paths(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {sharding.path_name(path) for path, leaf in leaves if leaf.dtype == 'float32'}


@pytest.mark.parametrize(
  'name, head, frozen, trained',
  [
    ('untied', 'language', (), ('lm_head/kernel',)),
    ('tied', 'language', (), ('embedding',)),
    ('untied', 'scalar', ('scalar_head/kernel',), ('scalar_head/kernel',)),
  ],
)
def test_norms_biases_and_heads_stay_wide(name, head, frozen, trained):
  config = models.CONFIGS[name]
  names = paths(models.params(config, head))
  for is_trained, heads in ((False, frozen), (True, trained)):
    options = {'trained': is_trained, 'tied': config.tie_word_embeddings}
    dtypes = {path: stored_dtype(path, 'bfloat16', **options) for path in names}
    wide = {path for path in names if path.endswith(('scale', 'bias', *heads))}
    assert wide and dtypes == {p: 'float32' if p in wide else 'bfloat16' for p in names}
  assert {stored_dtype(path, 'float32') for path in names} == {'float32'}


def test_decoding_reads_norms_as_training_does():
  """Cast to bfloat16 for the decode loop alone, a scale of 1.003 was 1 there."""
  config = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  decoder = make_decode_config(config, Sampling(), models.STOP_IDS, models.mesh(1))
  weights = decode_weights(models.params(config), decoder=decoder)
  assert float32_paths(weights._asdict()) == {
    'norm/scale',
    *(f'layers/{n}/params/{norm}/scale' for n in (0, 1) for norm in ('attention_norm', 'mlp_norm')),
  }


def test_plan_counts_what_is_loaded():
  config, mesh = models.CONFIG, models.mesh(1)
  names = paths(models.params(config))
  for is_trained, ends in ((False, 'scale'), (True, ('scale', 'lm_head/kernel'))):
    planned = abstract_arrays.params(config, 'language', 'bfloat16', mesh, trained=is_trained)
    assert float32_paths(planned) == {path for path in names if path.endswith(ends)}
  settings = Settings(runtime=Runtime(param_dtype='bfloat16'))
  state = abstract_arrays.state(config, 'language', Optimizer(), settings, mesh)
  assert float32_paths(state.params) == float32_paths(planned)
