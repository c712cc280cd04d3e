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
from segjax.model.llama import (
  Block,
  Llama,
  LlamaConfig,
  RopeScaling,
  layer_params,
  make_config,
  num_parameters,
  rope_frequencies,
  rotate,
)


@pytest.fixture(scope='module')
def language():
  return models.params(models.CONFIG)


@pytest.fixture(scope='module')
def scalar():
  return models.params(models.CONFIG, 'scalar', seed=1)


def read(language, scalar, ids):
  """Everything read off the networks, numpy [B, S] each."""
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
  before, after = read(language, scalar, ids), read(language, scalar, other)
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
  found = read(language, scalar, models.ids())
  for name in ('logprob', 'entropy', 'value'):
    assert_allclose(found[name][:, 0], 0)
    assert np.all(found[name][:, 1:] != 0)
  assert_allclose(found['value'][:, 1:], found['score'][:, :-1], rtol=1e-6)  # one program each


def test_padding_and_batch_mates_change_nothing(language, scalar):
  ids = models.ids()
  length = np.arange(3, 3 + 2 * models.BATCH, 2)
  real = np.arange(models.LENGTH)[None] < length[:, None]
  whole = read(language, scalar, ids)
  padded = read(language, scalar, np.where(real, ids, 0))
  mates = read(language, scalar, np.concatenate([ids[:1], models.ids(seed=9)[1:]]))
  shorter = read(language, scalar, ids[:, :16])
  for name in whole:
    # float32 sums of another order: another program, another row of a matrix product.
    assert_allclose(padded[name][real], whole[name][real], atol=1e-5, err_msg=name)
    assert_allclose(mates[name][0], whole[name][0], atol=1e-5, err_msg=name)
    assert_allclose(shorter[name], whole[name][:, :16], atol=1e-5, err_msg=name)


REMAT = {
  'full': {},
  'names': {'remat': 'attention,residual'},
  'offload': {'offload': 'hidden'},
  'both': {'remat': 'attention', 'offload': 'hidden,residual'},
  'none': {'remat': 'none'},
}


def test_remat_changes_nothing(language):
  ids = jnp.asarray(models.ids())

  def loss(params, config):
    logprob, entropy = heads.token_logprobs(params, ids, config)
    return jnp.sum(logprob) + jnp.sum(entropy**2)

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, expected_grads = grad(language, models.CONFIG)
  for name, how in REMAT.items():
    found, grads = grad(language, dataclasses.replace(models.CONFIG, **how))
    # The same sums, fused otherwise.
    assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-3), grads, expected_grads)


def test_what_is_kept_takes_memory():
  """Per layer: the input alone; two more of its size; everything."""
  config = dataclasses.replace(models.CONFIG, num_hidden_layers=8)
  shapes = heads.param_shapes(config, 'scalar')
  ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)

  def temporaries(how):
    def loss(params, ids):
      return jnp.sum(heads.scores(params, ids, dataclasses.replace(config, **how)))

    compiled = jax.jit(jax.grad(loss)).lower(shapes, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full, names, none = (temporaries(REMAT[name]) for name in ('full', 'names', 'none'))
  one = 4 * 8 * 8 * 64 * config.hidden_size  # float32, of all layers and tokens
  assert names - full == pytest.approx(2 * one, rel=0.3)
  assert none > full + 4 * one


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
  assert_allclose(scanned, by_hand(params), atol=1e-5)  # float32, fused otherwise


def silu(x):
  return x / (1 + np.exp(-x))


def without_context(params, config):
  """Hidden state of every token of the vocabulary by itself, with attention that finds 0."""
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
  return Llama(config).apply({'params': params}, ids, positions, segment_ids)


@pytest.mark.parametrize('remat', ['full', 'none'])
@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_unattended_tokens(config, remat):
  """Those attended find what they would with the others cut out; the others have no context."""
  config = dataclasses.replace(config, remat=remat)
  params, ids = models.params(config)['backbone'], models.ids()
  attended = np.random.default_rng(1).random(ids.shape) < 0.6
  attended[0], attended[1], attended[2] = True, False, np.arange(models.LENGTH) < 13
  run = functools.partial(hidden_states, params, config=config)
  positions = np.broadcast_to(np.arange(models.LENGTH), ids.shape)
  found = np.asarray(run(ids, positions, attended))

  order = np.argsort(~attended, axis=1, kind='stable')  # the attended first
  cut = run(np.take_along_axis(ids, order, 1), np.take_along_axis(positions, order, 1), None)
  expected = np.where(attended[..., None], 0.0, without_context(params, config)[ids])
  for row, (real, source) in enumerate(zip(attended, order, strict=True)):
    count = real.sum()
    expected[row, source[:count]] = cut[row, :count]
  assert_allclose(found, expected, atol=2e-5)  # float32, sums of other lengths

  other = np.where(attended, (ids + 1) % models.VOCAB, ids)
  again = np.asarray(run(other, positions, attended))
  np.testing.assert_array_equal(again[~attended], found[~attended])
  other = np.where(attended, ids, (ids + 1) % models.VOCAB)
  again = np.asarray(run(other, positions, attended))
  np.testing.assert_array_equal(again[attended], found[attended])
  assert_allclose(run(ids, positions, np.ones_like(attended)), run(ids, positions, None), atol=1e-6)


def test_positions_may_be_given(language):
  """RoPE is relative: all positions shifted alike change nothing."""
  ids = jnp.asarray(models.ids())
  positions = jnp.broadcast_to(jnp.arange(models.LENGTH)[None], ids.shape)
  run = jax.jit(lambda *given: Llama(models.CONFIG).apply({'params': language['backbone']}, *given))
  # Angles up to 47 radians, in float32.
  assert_allclose(run(ids, positions + 17), run(ids, positions), atol=1e-4)
  assert np.abs(run(ids, positions * 2) - run(ids, positions)).max() > 1e-2


def test_bfloat16_stays_near_float32(language, scalar):
  ids = models.ids()
  config = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  logprob, entropy = models.token_logprobs(language, ids, config)
  score = models.scores(scalar, ids, config)
  assert {logprob.dtype, entropy.dtype, score.dtype} == {jnp.dtype('float32')}
  expected = read(language, scalar, ids)
  # bfloat16 keeps 8 bits, and a layer adds numbers of size 10.
  assert_allclose(logprob, expected['logprob'], atol=0.4)
  assert_allclose(entropy, expected['entropy'], atol=0.2)
  assert_allclose(score, expected['score'], atol=0.4)
  assert np.abs(logprob - expected['logprob']).mean() < 0.03


def test_norm_and_rope_in_float32():
  """Their sums and angles are in float32 though what goes in and out is bfloat16."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.bfloat16)
  positions = jnp.arange(4)[None] + 50
  rotated = rotate(x, positions, models.CONFIG)
  assert rotated.dtype == jnp.bfloat16
  expected = rotate(x.astype(jnp.float32), positions, models.CONFIG)
  # Half a unit in the last of 8 bits, of numbers below 4.
  assert_allclose(rotated.astype(jnp.float32), expected, atol=2**-7)


SCALINGS = {
  'default': None,
  'linear': RopeScaling('linear', 3.0),
  'llama31': RopeScaling('llama3', 8.0, 1.0, 4.0, 8192),
  'llama32': RopeScaling('llama3', 32.0, 1.0, 4.0, 8192),
  'short': RopeScaling('llama3', 4.0, 1.0, 4.0, 16),
}


@pytest.mark.parametrize('name', SCALINGS)
@pytest.mark.parametrize('head_dim', [64, 128])
def test_rope_frequencies_equal_transformers(name, head_dim):
  pytest.importorskip('torch')
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaling = SCALINGS[name]
  config = LlamaConfig(
    **{'vocab_size': 80, 'hidden_size': 4 * head_dim, 'intermediate_size': 48},
    **{'num_hidden_layers': 1, 'num_attention_heads': 4, 'num_key_value_heads': 2},
    head_dim=head_dim,
    rope_scaling=scaling,
  )
  parameters = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  if scaling is not None:
    parameters |= dataclasses.asdict(scaling)
    parameters['rope_type'] = parameters.pop('kind')
  theirs = transformers.LlamaConfig(
    hidden_size=config.hidden_size,
    num_attention_heads=4,
    head_dim=head_dim,
    max_position_embeddings=131072,
    rope_parameters=parameters,
  )
  if scaling is None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
  else:
    expected, _ = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, 'cpu')
  assert_allclose(rope_frequencies(config), expected.numpy(), rtol=1e-5)  # theirs is float32


def test_unknown_rope_type_is_refused():
  config = dataclasses.replace(models.CONFIG, rope_scaling=RopeScaling('yarn', 2.0))
  with pytest.raises(ValueError, match=r"'yarn' is not one of default, linear, llama3"):
    rope_frequencies(config)


def test_rotation_is_relative_and_keeps_length():
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

  def product(i, j):
    at = [rotate(x, jnp.array([[p]]), models.TIED) for x, p in ((query, i), (key, j))]
    return jnp.sum(at[0] * at[1], axis=-1)

  # float32 angles below 40 radians.
  assert_allclose(product(5, 3), product(39, 37), atol=1e-4)
  assert_allclose(product(4, 4), jnp.sum(query * key, axis=-1), atol=1e-5)
  assert np.abs(product(5, 3) - product(3, 5)).max() > 1e-2


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_num_parameters(config):
  shapes = heads.param_shapes(config, 'language')
  assert num_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_config_of_settings():
  config = make_config(Network(vocab_size=80, hidden_size=64, num_attention_heads=4))
  assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (80, 16, 2)
