import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from numpy.testing import assert_allclose

from segjax.model import heads, sharding
from segjax.model.llama import RowLayout
from segjax.rl.logprobs import logprob_and_entropy


def dense(params, ids, config):
  """Log-prob and entropy out of the full logits."""
  logits = heads.logits(params, ids, config)[:, :-1]
  return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in logprob_and_entropy(logits, ids[:, 1:]))


@pytest.mark.campaign  # model/fused_head_test.py has the function by itself
@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_chunked_head_equals_dense(config):
  params, ids = models.params(config), jnp.asarray(models.ids())
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, *ids.shape)), jnp.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, read):
    def loss(params):
      outputs = read(params, ids, config)
      return jnp.sum(weight[0] * outputs[0] + weight[1] * outputs[1]), outputs

    return jax.grad(loss, has_aux=True)(params)

  # 80 tokens are not a multiple of config.vocab_chunk = 32.
  grads, outputs = run(params, heads.token_logprobs)
  expected_grads, expected = run(params, dense)
  # float32; gradients are sums of 184 terms of size 1 to 100.
  jax.tree.map(functools.partial(assert_allclose, atol=2e-5), outputs, expected)
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-3, atol=1e-3), grads, expected_grads)
  smallest = min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(grads))
  assert smallest > 1e-2  # every parameter has a gradient


def shapes_within(jaxpr):
  """Shapes of all intermediate arrays, inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield getattr(variable.aval, 'shape', ())
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
      if _is_program(inner):
        yield from shapes_within(getattr(inner, 'jaxpr', inner))


def _is_program(x):
  return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
def test_logits_of_all_positions_never_exist(config):
  """Not even stacked up over the pieces for the backward pass."""
  params, ids = models.params(config), jnp.asarray(models.ids())

  def huge(read):
    def loss(params):
      logprob, entropy = read(params, ids, config)
      return jnp.sum(logprob) + jnp.sum(entropy)

    shapes = set(shapes_within(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    return [x for x in shapes if models.VOCAB in x and np.prod(x) >= ids.size * models.VOCAB]

  assert huge(heads.token_logprobs) == []
  assert huge(dense)  # the search works


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
@pytest.mark.parametrize('head', heads.HEADS)
def test_init_params(config, head):
  params = jax.jit(heads.init_params, static_argnums=(1, 2))(jax.random.key(0), config, head)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, heads.param_shapes(config, head)
  )
  tied = config.tie_word_embeddings
  assert set(params) - {'backbone'} == (
    {'scalar_head'} if head == 'scalar' else set() if tied else {'lm_head'}
  )
  backbone = params['backbone']
  assert_allclose(backbone['norm']['scale'], 1)
  # 2560 draws: the standard deviation has an error of 1.4 per cent.
  assert_allclose(jnp.std(backbone['embedding']), config.initializer_range, rtol=0.06)
  for name in ('query', 'gate', 'down'):
    kernel = backbone['layers'][name]['kernel']
    assert_allclose(jnp.std(kernel), config.initializer_range, rtol=0.1)
    assert np.any(kernel[0] != kernel[1])  # layers are drawn independently


def test_scalar_head_is_small_and_has_no_bias():
  draw = jax.jit(
    jax.vmap(lambda key: heads.init_params(key, models.CONFIG, 'scalar')['scalar_head'])
  )
  head = draw(jax.random.split(jax.random.key(0), 256))
  assert set(head) == {'kernel'}
  assert head['kernel'].shape == (256, 32, 1)
  assert_allclose(jnp.std(head['kernel']), 1 / (32 + 1), rtol=0.05)  # 8192 draws: 0.8 per cent
  assert_allclose(jnp.mean(head['kernel']), 0, atol=0.002)


def test_scores_are_the_hidden_states_times_the_head():
  params, ids = models.params(models.CONFIG, 'scalar'), jnp.asarray(models.ids())
  double = params | {'scalar_head': {'kernel': 2 * params['scalar_head']['kernel']}}
  score = models.scores(params, ids, models.CONFIG)
  assert score.shape == ids.shape
  assert_allclose(
    models.scores(double, ids, models.CONFIG), 2 * score, rtol=1e-6
  )  # nothing is added


# Number of attended tokens per row; none in the last.
ATTENDED = np.arange(models.LENGTH) < np.array([24, 1, 5, 8, 13, 23, 17, 0])[:, None]


@pytest.mark.parametrize('name', ['token_logprobs', 'scores', 'values', 'logits'])
def test_unattended_tails(name):
  """Attended tokens give what they do in the full row; the others have no context."""
  head = 'language' if name in ('token_logprobs', 'logits') else 'scalar'
  read, params = getattr(models, name), models.params(models.CONFIG, head)
  ids = models.ids()
  full = read(params, ids, models.CONFIG)
  tailless = read(params, ids, models.CONFIG, RowLayout(segment_ids=ATTENDED.astype(int)))
  # Log-probs, entropies and values are read at the hidden state before their token.
  attended = ATTENDED
  if name in ('token_logprobs', 'values'):
    attended = np.pad(ATTENDED[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  for got, expected in zip(jax.tree.leaves(tailless), jax.tree.leaves(full), strict=True):
    got, expected = np.asarray(got), np.asarray(expected)
    assert_allclose(got[attended], expected[attended], atol=1e-5)  # float32
    assert np.abs(got - expected)[~attended].max() > 0.1
    assert np.all(np.isfinite(got))


def test_gradient_with_unattended_tokens():
  """Finite; a loss on attended tokens gives no gradient to tokens that are never attended."""
  params, half = models.params(models.CONFIG), models.VOCAB // 2
  ids, attended = models.ids() % half, jnp.asarray(ATTENDED)
  ids, rows = jnp.where(attended, ids, half + ids), RowLayout(segment_ids=attended.astype(int))

  @jax.jit
  def grads(params, weight):
    def loss(params):
      logprob, entropy = heads.token_logprobs(params, ids, models.CONFIG, rows)
      return jnp.sum(weight * (logprob + entropy))

    return jax.grad(loss)(params)

  everywhere = grads(params, jnp.ones(ids.shape))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(everywhere))
  norm = np.linalg.norm(everywhere['backbone']['embedding'], axis=-1)
  assert norm[half:].max() > 1e-2
  at_attended = grads(params, attended.astype(jnp.float32))
  norm = np.linalg.norm(at_attended['backbone']['embedding'], axis=-1)
  assert norm[:half].max() > 1e-2
  assert np.all(norm[half:] == 0)


@pytest.mark.devices
def test_unattended_tokens_on_eight_devices():
  ids, outputs = models.ids(), {}
  read = jax.jit(heads.token_logprobs, static_argnames='config')
  for devices in (1, 8):
    mesh = models.mesh(devices)
    with jax.set_mesh(mesh), models.captured_stderr() as lines:
      params = models.place(models.params(models.CONFIG), mesh)
      placed_ids, segment_ids = sharding.place_batch((ids, ATTENDED.astype(int)), mesh)
      rows = RowLayout(segment_ids=segment_ids)
      outputs[devices] = jax.device_get(read(params, placed_ids, models.CONFIG, rows))
    assert models.rematerialisations(lines) == []
  jax.tree.map(functools.partial(assert_allclose, atol=1e-5), outputs[8], outputs[1])  # float32


def test_unknown_head():
  with pytest.raises(ValueError, match=r"head='value' is not one of \('language', 'scalar'\)"):
    heads.param_shapes(models.CONFIG, 'value')
