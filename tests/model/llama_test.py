import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_allclose

from segjax.config.settings import Network
from segjax.model import heads
from segjax.model.layers import Linear, RMSNorm
from segjax.model.llama import (
  Block,
  Llama,
  RowLayout,
  make_config,
  num_parameters,
)


@pytest.fixture(scope='module')
def language():
  return models.params(models.CONFIG)


@pytest.fixture(scope='module')
def scalar():
  return models.params(models.CONFIG, 'scalar', seed=1)


def outputs_of(language, scalar, ids):
  """All outputs of the networks by name, numpy [B, S] each."""
  logprob, entropy = models.token_logprobs(language, ids, models.CONFIG)
  score = models.scores(scalar, ids, models.CONFIG)
  value = models.values(scalar, ids, models.CONFIG)
  names = ('logprob', 'entropy', 'score', 'value')
  return dict(zip(names, jax.device_get((logprob, entropy, score, value)), strict=True))


@pytest.mark.parametrize('t', [0, 7, 16, 23])
def test_a_token_changes_nothing_before_it(language, scalar, t):
  ids = models.ids()
  other = ids.copy()
  other[:, t] = (other[:, t] + 1) % models.VOCAB
  before, after = outputs_of(language, scalar, ids), outputs_of(language, scalar, other)
  for name in before:
    # Equal to the bit: the same sums over the same numbers.
    np.testing.assert_array_equal(before[name][:, :t], after[name][:, :t], err_msg=name)
  # Entropy and value of token t are read before it, its log-prob and score at it.
  for name in ('entropy', 'value'):
    np.testing.assert_array_equal(before[name][:, t], after[name][:, t], err_msg=name)
  assert np.all(before['score'][:, t:] != after['score'][:, t:])
  if t:
    assert np.all(before['logprob'][:, t] != after['logprob'][:, t])


def test_first_token_has_no_prediction(language, scalar):
  outputs = outputs_of(language, scalar, models.ids())
  for name in ('logprob', 'entropy', 'value'):
    assert_allclose(outputs[name][:, 0], 0)
    assert np.all(outputs[name][:, 1:] != 0)
  assert_allclose(outputs['value'][:, 1:], outputs['score'][:, :-1], rtol=1e-6)  # two programs


def test_padding_and_batch_mates_change_nothing(language, scalar):
  ids = models.ids()
  length = np.arange(3, 3 + 2 * models.BATCH, 2)
  real = np.arange(models.LENGTH)[None] < length[:, None]
  full = outputs_of(language, scalar, ids)
  padded = outputs_of(language, scalar, np.where(real, ids, 0))
  mates = outputs_of(language, scalar, np.concatenate([ids[:1], models.ids(seed=9)[1:]]))
  shorter = outputs_of(language, scalar, ids[:, :16])
  for name in full:
    # float32 sums in another order: another program, another row of a matrix product.
    assert_allclose(padded[name][real], full[name][real], atol=1e-5, err_msg=name)
    assert_allclose(mates[name][0], full[name][0], atol=1e-5, err_msg=name)
    assert_allclose(shorter[name], full[name][:, :16], atol=1e-5, err_msg=name)


REMAT = {
  'full': {},
  'names': {'remat': 'attention,residual'},
  'offload': {'offload': 'hidden'},
  'both': {'remat': 'attention', 'offload': 'hidden,residual'},
  'none': {'remat': 'none'},
}


@pytest.mark.compiled
def test_remat_changes_nothing(language):
  ids = jnp.asarray(models.ids())

  def loss(params, config):
    logprob, entropy = heads.token_logprobs(params, ids, config)
    return jnp.sum(logprob) + jnp.sum(entropy**2)

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, expected_grads = grad(language, models.CONFIG)
  for name, options in REMAT.items():
    value, grads = grad(language, dataclasses.replace(models.CONFIG, **options))
    # The same sums, fused in another way.
    assert_allclose(value, expected, rtol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-3), grads, expected_grads)


@pytest.mark.compiled
def test_saved_activations_take_memory():
  """Per layer: the input alone; two more arrays of its size; everything."""
  config = dataclasses.replace(models.CONFIG, num_hidden_layers=8)
  shapes = heads.param_shapes(config, 'scalar')
  ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)

  def temporaries(options):
    def loss(params, ids):
      return jnp.sum(heads.scores(params, ids, dataclasses.replace(config, **options)))

    compiled = jax.jit(jax.grad(loss)).lower(shapes, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full, names, none = (temporaries(REMAT[name]) for name in ('full', 'names', 'none'))
  hidden = 4 * 8 * 8 * 64 * config.hidden_size  # bytes, float32, all layers and tokens
  assert names - full == pytest.approx(2 * hidden, rel=0.3)
  assert none > full + 4 * hidden


def layer_params(params, index):
  return jax.tree.map(lambda leaf: leaf[index], params['layers'])


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_scan_equals_blocks_by_hand(config):
  params = models.params(config)['backbone']
  ids = jnp.asarray(models.ids())
  positions = jnp.broadcast_to(jnp.arange(models.LENGTH)[None], ids.shape)

  @jax.jit
  def by_hand(params):
    x = params['embedding'][ids]
    for index in range(config.num_hidden_layers):
      x, _ = Block(config).apply({'params': layer_params(params, index)}, x, positions)
    scale = params['norm']['scale'][None, None]
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale

  scanned = jax.jit(lambda params: Llama(config).apply({'params': params}, ids))(params)
  assert_allclose(scanned, by_hand(params), atol=1e-5)  # float32, fused in another way


def silu(x):
  return x / (1 + np.exp(-x))


def without_context(params, config):
  """Hidden state of every token of the vocabulary alone, where attention returns 0."""
  params = jax.tree.map(np.asarray, params)

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale

  def linear(x, part):
    return x @ part['kernel'] + part.get('bias', 0)

  x = params['embedding']
  for index in range(config.num_hidden_layers):
    layer = layer_params(params, index)
    x = x + layer['output'].get('bias', 0)
    y = norm(x, layer['mlp_norm']['scale'])
    x = x + linear(silu(linear(y, layer['gate'])) * linear(y, layer['up']), layer['down'])
  return norm(x, params['norm']['scale'])


@functools.partial(jax.jit, static_argnames='config')
def hidden_states(params, ids, positions, attended, config):
  segment_ids = None if attended is None else attended.astype(int)
  return Llama(config).apply({'params': params}, ids, RowLayout(positions, segment_ids))


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_unattended_tokens(config):
  """Attended tokens give what they would without the others; the others have no context."""
  params, ids = models.params(config)['backbone'], models.ids()
  attended = np.random.default_rng(1).random(ids.shape) < 0.6
  attended[0], attended[1], attended[2] = True, False, np.arange(models.LENGTH) < 13
  run = functools.partial(hidden_states, params, config=config)
  positions = np.broadcast_to(np.arange(models.LENGTH), ids.shape)
  hidden = np.asarray(run(ids, positions, attended))

  order = np.argsort(~attended, axis=1, kind='stable')  # the attended first
  alone = run(np.take_along_axis(ids, order, 1), np.take_along_axis(positions, order, 1), None)
  expected = np.where(attended[..., None], 0.0, without_context(params, config)[ids])
  for row, (real, source) in enumerate(zip(attended, order, strict=True)):
    count = real.sum()
    expected[row, source[:count]] = alone[row, :count]
  assert_allclose(hidden, expected, atol=2e-5)  # float32, sums of other lengths

  other = np.where(attended, (ids + 1) % models.VOCAB, ids)
  again = np.asarray(run(other, positions, attended))
  np.testing.assert_array_equal(again[~attended], hidden[~attended])
  other = np.where(attended, ids, (ids + 1) % models.VOCAB)
  again = np.asarray(run(other, positions, attended))
  np.testing.assert_array_equal(again[attended], hidden[attended])
  assert_allclose(run(ids, positions, np.ones_like(attended)), run(ids, positions, None), atol=1e-6)


def test_positions_can_be_passed(language):
  """RoPE is relative: all positions shifted alike change nothing."""
  ids = jnp.asarray(models.ids())
  positions = jnp.broadcast_to(jnp.arange(models.LENGTH)[None], ids.shape)

  @jax.jit
  def run(positions):
    params = {'params': language['backbone']}
    return Llama(models.CONFIG).apply(params, ids, RowLayout(positions))

  # Angles up to 47 radians, in float32.
  assert_allclose(run(positions + 17), run(positions), atol=1e-4)
  assert np.abs(run(positions * 2) - run(positions)).max() > 1e-2


def test_bfloat16_stays_near_float32(language, scalar):
  ids = models.ids()
  config = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  logprob, entropy = models.token_logprobs(language, ids, config)
  score = models.scores(scalar, ids, config)
  assert {logprob.dtype, entropy.dtype, score.dtype} == {jnp.dtype('float32')}
  expected = outputs_of(language, scalar, ids)
  # bfloat16 keeps 8 bits, and a layer adds numbers of size 10.
  assert_allclose(logprob, expected['logprob'], atol=0.4)
  assert_allclose(entropy, expected['entropy'], atol=0.2)
  assert_allclose(score, expected['score'], atol=0.4)
  assert np.abs(logprob - expected['logprob']).mean() < 0.03


@pytest.mark.parametrize('name', ['scale', 'bias'])
def test_gradients_of_scales_and_biases_add_up_in_float32(name):
  """Over 4,096 tokens whose gradients share a mean; in bfloat16 much of the sum is lost."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 4096, 32)), jnp.bfloat16)
  cotangent = jnp.asarray(rng.normal(0.3, 1, x.shape), jnp.bfloat16)
  layer = RMSNorm(1e-5) if name == 'scale' else Linear(32, True, 0.1)
  params = {'scale': jnp.ones(32)}
  if name == 'bias':
    params = {'kernel': jnp.eye(32), 'bias': jnp.zeros(32)}

  @jax.jit
  def grad(params, x):
    def loss(params):
      # By sign, so that the sum over tokens of the scale's gradient does not cancel.
      sign = jnp.sign(x) if name == 'scale' else 1
      return jnp.sum((layer.apply({'params': params}, x) * cotangent * sign).astype(jnp.float32))

    return jax.grad(loss)(params)[name]

  got, expected = grad(params, x), grad(params, x.astype(jnp.float32))
  assert_allclose(got, expected, rtol=0.01)


def test_norm_rounds_once():
  """x and the scale are multiplied in float32, of a scale that bfloat16 cannot hold."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
  params = {'params': {'scale': jnp.full(32, 1.003)}}
  exact = RMSNorm(1e-5).apply(params, x.astype(jnp.float32))
  np.testing.assert_array_equal(RMSNorm(1e-5).apply(params, x), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_num_parameters(config):
  shapes = heads.param_shapes(config, 'language')
  assert num_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_config_from_settings():
  config = make_config(Network(vocab_size=80, hidden_size=64, num_attention_heads=4))
  assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (80, 16, 2)
