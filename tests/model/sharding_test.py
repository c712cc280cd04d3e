import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import adapters, models
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from segjax.config.settings import Optimizer
from segjax.model import heads, sharding
from segjax.model.mesh import decode_mesh, make_mesh
from segjax.model.quantized import quantize_layers
from segjax.train.optimizer import init_state, make_optimizer


def names_of(tree):
  return [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
@pytest.mark.parametrize('head', heads.HEADS)
def test_every_tensor_matches_one_rule(config, head):
  params = heads.param_shapes(config, head)
  state = jax.eval_shape(make_optimizer(Optimizer(), 10).init, params)
  names = names_of(params) + names_of(state) + names_of({'step': 0, 'params': params})
  assert len(names) > 4 * len(jax.tree.leaves(params))  # parameter, two moments, train state
  for name in names:
    matches = [pattern for pattern, _ in sharding.PARAMETER_RULES if re.search(pattern, name)]
    assert len(matches) == 1, (name, matches)


def test_every_rule_matches_some_tensor():
  decoded = jax.eval_shape(quantize_layers, heads.param_shapes(models.CONFIG, 'language'))
  names = ['opt_state/0/notfinite_count', 'step', *names_of(decoded)]
  names += ['scalar_head/bias', 'scalar_head/hidden/kernel']  # of a `score_head.ScoreHead`
  for config in (*models.CONFIGS.values(), adapters.config()):
    for head in heads.HEADS:
      params = heads.param_shapes(config, head)
      names += names_of(params) + names_of(
        jax.eval_shape(make_optimizer(Optimizer(), 1).init, params)
      )
  for pattern, _ in sharding.PARAMETER_RULES:
    assert any(re.search(pattern, name) for name in names), pattern


def test_no_rule_or_two_rules_raise(monkeypatch):
  with pytest.raises(ValueError, match=r"0 rules .* match tensor 'adapter/kernel'; exactly one"):
    sharding.parameter_spec('adapter/kernel')
  twice = (*sharding.PARAMETER_RULES, (r'embedding$', P()))
  monkeypatch.setattr(sharding, 'PARAMETER_RULES', twice)
  with pytest.raises(ValueError, match=r"2 rules .* match tensor 'backbone/embedding'"):
    sharding.parameter_spec('backbone/embedding')


@pytest.mark.parametrize(('rows', 'fix'), [(6, 'use 4 or 8'), (3, 'use 4'), (9, 'use 8 or 12')])
def test_batch_that_does_not_divide(rows, fix):
  with pytest.raises(ValueError, match=rf'a batch of {rows} rows .* 4 devices.*; {fix}\.$'):
    sharding.place_batch({'ids': np.zeros((rows, 3))}, models.mesh(8))


def test_place_batch():
  batch = {'ids': np.arange(24).reshape(8, 3), 'finished': np.arange(8) > 3}
  placed = sharding.place_batch(batch, models.mesh(8))
  for name, x in placed.items():
    np.testing.assert_array_equal(x, batch[name])
    assert x.sharding.shard_shape(x.shape)[0] == 2


def test_axes_that_do_not_divide_are_left_out():
  mesh = models.mesh(8)

  def spec(name, *shape):
    return sharding.parameter_sharding(name, shape, mesh).spec

  assert spec('backbone/embedding', 80, 32) == P(('tensor',), ('fsdp',))
  assert spec('backbone/embedding', 81, 32) == P(None, ('fsdp',))
  assert spec('backbone/embedding', 80, 33) == P(('tensor',), None)
  assert spec('lm_head/kernel', 32, 81) == P(('fsdp',), None)


@pytest.mark.parametrize(
  ('sizes', 'tensor'),
  [
    ((1, 8, 1), 2),  # split between four groups in training
    ((2, 2, 2), 2),
    ((1, 4, 2), 4),  # groups of decoding that are parts of fsdp and all of tensor
    ((1, 2, 4), 2),
    ((2, 4, 1), 4),  # a copy in training is a group of decoding: nothing leaves the group
  ],
)
def test_weights_cross_once_from_the_training_to_the_decode_mesh(sizes, tensor):
  mesh = make_mesh(*sizes)
  params = models.place(models.params(models.CONFIG), mesh)
  with jax.set_mesh(decode_mesh(mesh, 4, 4, tensor)), models.captured_stderr() as lines:
    compiled = jax.jit(sharding.decode_sharding).lower(params).compile()
    weights = compiled(params)
  assert not models.rematerialisations(lines)
  jax.tree.map(np.testing.assert_array_equal, weights, params)
  layers = weights['backbone']['layers']
  for name, axis in (('query', 2), ('up', 2), ('down', 1)):
    kernel = layers[name]['kernel']
    parts = [size // shard for size, shard in zip(kernel.shape, shard_shape(kernel), strict=True)]
    assert parts == [tensor if i == axis else 1 for i in range(3)], name
  assert shard_shape(weights['lm_head']['kernel']) == (32, models.VOCAB // tensor)
  assert shard_shape(weights['backbone']['embedding']) == (models.VOCAB // tensor, 32)
  # What a device receives is what it keeps: no weight is gathered and then cut.
  received = [math.prod(map(int, size.split(','))) for size in GATHERED.findall(compiled.as_text())]
  kept = [math.prod(shard_shape(x)) for x in jax.tree.leaves(weights)]
  assert max(received, default=0) <= max(kept)
  assert sum(received) <= sum(kept)
  if sizes[0] == 8 // tensor:
    assert not received


GATHERED = re.compile(r'f32\[([0-9,]+)\]\S* all-gather\(')


def shard_shape(x):
  return x.addressable_shards[0].data.shape


def test_one_device_moves_no_weight():
  params = {'odd': jnp.ones(3)}
  with jax.set_mesh(decode_mesh(models.mesh(1), 4, 2)):
    assert sharding.decode_sharding(params)['odd'] is params['odd']


def test_rows_are_sampled_by_all_devices_where_they_divide():
  mesh = decode_mesh(models.mesh(8), 4, 2)
  spec = sharding.ACTIVATION_RULES['decode_row_logits']
  assert NamedSharding(mesh, sharding.fitted(spec, (16, 80), mesh)).shard_shape((16, 80)) == (2, 80)
  # Rows of a group are then on each of its devices.
  assert NamedSharding(mesh, sharding.fitted(spec, (4, 80), mesh)).shard_shape((4, 80)) == (1, 80)


@pytest.mark.parametrize(
  ('name', 'shape', 'part'),
  [
    ('decode_pages', (2, 24, 64, 8), (1, 6, 64, 8)),  # key heads, groups x layers x pages
    ('decode_ragged_pages', (24, 64, 4, 8), (6, 64, 2, 8)),  # a key head with its value
  ],
)
def test_pages_are_split_by_groups_and_heads(name, shape, part):
  mesh = decode_mesh(models.mesh(8), 4, 2)  # four groups of two
  spec = sharding.fitted(sharding.ACTIVATION_RULES[name], shape, mesh)
  assert NamedSharding(mesh, spec).shard_shape(shape) == part


def test_no_mesh_no_change():
  x = jnp.ones((8, 3))
  assert sharding.constrain(x, 'tokens') is x
  assert sharding.constrain_batch(x) is x
  assert sharding.constrain_tree({'odd': x})['odd'] is x
  assert sharding.decode_sharding({'odd': x})['odd'] is x


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_weights_and_moments_are_split_alike(config):
  mesh = models.mesh(8)
  with jax.set_mesh(mesh):
    params = models.place(models.params(config), mesh)
    state = init_state(params, Optimizer(), 10)
  assert_moments_follow(state)
  kernels = params['backbone']['layers']
  # Per device: the width over fsdp, heads and MLP width over tensor.
  for name, shard in (('query', (2, 16, 16)), ('up', (2, 16, 24)), ('down', (2, 24, 16))):
    assert kernels[name]['kernel'].addressable_shards[0].data.shape == shard
  assert params['backbone']['embedding'].addressable_shards[0].data.shape == (40, 16)


def assert_moments_follow(state):
  """Each moment is laid out like its parameter; the other state is on every device."""
  layouts = {
    sharding.path_name(path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  moments = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    owner = [name for name in layouts if sharding.path_name(path).endswith(f'/{name}')]
    if owner:
      assert leaf.sharding.is_equivalent_to(layouts[owner[0]], leaf.ndim), path
      moments += 1
    else:
      assert leaf.sharding.is_fully_replicated
  assert moments == 2 * len(layouts)
  assert state.step.sharding.device_set == next(iter(layouts.values())).device_set


def test_the_warning_can_be_seen():
  """The tests for involuntary rematerialisation would notice one."""
  mesh = models.mesh(8)

  def transpose_devices(x):
    x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P('tensor', None, None)))
    x = jax.lax.with_sharding_constraint(
      x + 1, NamedSharding(mesh, P(None, None, ('tensor', 'data')))
    )
    return x * 3

  with models.captured_stderr() as lines:
    jax.jit(transpose_devices).lower(jnp.ones((8, 8, 8))).compile()
  assert models.rematerialisations(lines)
