"""Log-probs and entropies of the head, and their gradients, against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose

from segjax.model import fused_head, sharding
from segjax.model.fused_head import fused_logprobs
from segjax.rl.logprobs import logprob_and_entropy

WIDTH = 32


def arrays(rows, length, vocab):
  """Returns hidden states, kernel, targets, and weights of log-probs and entropies."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(rows, length, WIDTH)).astype(np.float32)
  kernel = rng.normal(size=(WIDTH, vocab)).astype(np.float32)
  target = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  return hidden, kernel, target, rng.normal(size=(2, rows, length)).astype(np.float32)


def grads_and_outputs(read, hidden, kernel, target, weight):
  def loss(hidden, kernel):
    outputs = read(hidden, kernel, target)
    return sum(jnp.sum(w * x) for w, x in zip(weight, outputs, strict=True)), outputs

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)


@functools.cache
def dense(*sizes):
  """Returns gradients and outputs of the full logits in float64."""
  with jax.enable_x64(True):

    def read(hidden, kernel, target):
      return logprob_and_entropy(jnp.einsum('bsd,dv->bsv', hidden, kernel), target)

    hidden, kernel, target, weight = arrays(*sizes)
    wide = (jnp.asarray(x, jnp.float64) for x in (hidden, kernel))
    return jax.device_get(grads_and_outputs(read, *wide, jnp.asarray(target), weight))


def head_config(chunk=32):
  return dataclasses.replace(models.CONFIG, vocab_chunk=chunk)


def fused(config, mesh, hidden, kernel, target, weight):
  """Returns gradients and outputs of `fused_logprobs`, its arguments laid out on the mesh."""

  def place(x, spec):
    return jax.device_put(x, NamedSharding(mesh, sharding.fitted(spec, x.shape, mesh)))

  with jax.set_mesh(mesh):
    hidden = place(hidden, sharding.ACTIVATION_RULES['hidden'])
    kernel = place(kernel, sharding.parameter_spec('lm_head/kernel'))
    run = jax.jit(functools.partial(grads_and_outputs, lambda *a: fused_logprobs(*a, config)))
    grads, outputs = run(hidden, kernel, target, weight)
  assert grads[1].sharding.shard_shape(kernel.shape) == kernel.sharding.shard_shape(kernel.shape)
  return jax.device_get((grads, outputs))


def assert_close(got, expected, relative=1e-6):
  """Of the norm: single numbers may be sums of large terms."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.linalg.norm(a - b) < relative * np.linalg.norm(b)


# Pieces that divide the vocabulary, that overlap, and all of it at once.
@pytest.mark.parametrize('chunk', [20, 32, 100])
def test_equals_dense_float64(chunk):
  sizes = (8, 24, 80)
  got = fused(head_config(chunk=chunk), models.mesh(1), *arrays(*sizes))
  assert_close(got, dense(*sizes))


# The last sizes do not divide over the axes of the mesh, which are dropped or split less.
@pytest.mark.devices
@pytest.mark.parametrize('chunk', [32, 100])
@pytest.mark.parametrize(
  'sizes', [(8, 24, 80), (8, 23, 80), (8, 24, 82), (8, 24, 81), (2, 24, 80), (1, 5, 80)]
)
def test_eight_devices_equal_dense_float64(chunk, sizes):
  assert_close(fused(head_config(chunk), models.mesh(8), *arrays(*sizes)), dense(*sizes))


@pytest.mark.devices
@pytest.mark.parametrize('devices', [1, 8])
def test_bfloat16_states(devices):
  """Products add up in float32: errors are those of the states and of the factors of products."""
  hidden, *rest = arrays(8, 24, 80)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  (of_hidden, of_kernel), outputs = fused(head_config(), models.mesh(devices), hidden, *rest)
  expected = dense(8, 24, 80)
  assert of_hidden.dtype == jnp.bfloat16 and of_kernel.dtype == np.float32
  assert {x.dtype for x in outputs} == {np.dtype(np.float32)}
  got = (of_hidden.astype(np.float32), of_kernel), outputs
  assert_close(got, expected, relative=1e-2)


def test_gradients_of_one_output():
  """An output that the loss does not read has no gradient, which is not computed."""
  hidden, kernel, target, weight = map(jnp.asarray, arrays(8, 24, 80))

  @functools.partial(jax.jit, static_argnums=0)
  def grads(which):
    def loss(hidden, kernel):
      outputs = fused_logprobs(hidden, kernel, target, head_config())
      return sum(jnp.sum(weight[i] * outputs[i]) for i in which)

    return jax.grad(loss, argnums=(0, 1))(hidden, kernel)

  total = jax.tree.map(jnp.add, grads((0,)), grads((1,)))
  assert_close(jax.device_get(total), dense(8, 24, 80)[0])


def test_impossible_tokens():
  """A kernel of −inf: p = 0, and no NaN in log-probs, entropies and the gradient of the kernel."""
  hidden, kernel, target, weight = arrays(2, 24, 80)
  hidden = np.abs(hidden)
  impossible = np.arange(80) % 3 == 1
  target = target - impossible[target]  # 0 for 1, 3 for 4, ...
  finite, kernel = kernel[:, ~impossible], np.where(impossible, -np.inf, kernel)
  (_, of_kernel), outputs = fused(head_config(), models.mesh(1), hidden, kernel, target, weight)
  index = np.cumsum(~impossible)[target] - 1
  (_, of_finite), expected = fused(
    head_config(), models.mesh(1), hidden, finite, index.astype(np.int32), weight
  )
  assert_close((of_kernel[:, ~impossible], outputs), (of_finite, expected))
  assert not of_kernel[:, impossible].any()


def test_logits_of_bfloat16_states_are_not_rounded():
  """Logits around 20 are 1/8 apart in bfloat16, and so were the log-probs of two programs."""
  rng = np.random.default_rng(3)
  hidden = jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16)
  kernel = jnp.asarray(rng.normal(size=(64, 40)), jnp.bfloat16)
  exact = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
  product = jax.jit(fused_head.logit_product, static_argnums=2)
  logits = product(hidden, kernel, False)
  assert np.abs(exact).max() > 16 and logits.dtype == jnp.float32
  assert_allclose(logits, exact, atol=1e-4)
  logits = np.asarray(product(hidden, kernel, True))
  np.testing.assert_array_equal(logits, logits.astype(jnp.bfloat16).astype(np.float32))
  assert np.abs(logits - exact).max() > 1e-2


def test_rounded_logits():
  """`round_logits` reaches the log-probs."""
  hidden, kernel, target, _ = arrays(2, 24, 80)
  hidden, kernel = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel))
  config = dataclasses.replace(head_config(), round_logits=True)
  logits = fused_head.logit_product(hidden.reshape(-1, WIDTH), kernel, True).reshape(2, 24, 80)
  expected = logprob_and_entropy(logits, jnp.asarray(target))
  got = jax.jit(fused_logprobs, static_argnums=3)(hidden, kernel, target, config)
  jax.tree.map(functools.partial(assert_allclose, atol=1e-5), got, expected)


@pytest.mark.compiled
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_one_piece_of_logits_exists(dtype):
  """8 x 256 tokens, the vocabulary of Llama-3: five such buffers lived at once."""
  config = dataclasses.replace(models.CONFIG, vocab_chunk=8192)
  shapes = [
    jax.ShapeDtypeStruct(*x)
    for x in (((8, 256, 64), dtype), ((64, 128256), 'float32'), ((8, 256), 'int32'))
  ]

  def temporaries(function):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  def loss(hidden, kernel, target):
    logprob, entropy = fused_logprobs(hidden, kernel, target, config)
    return jnp.sum(logprob**2) + jnp.sum(entropy)

  piece = 4 * 8 * 256 * 8064
  backward = temporaries(jax.grad(loss, argnums=(0, 1)))
  assert piece < backward < 1.3 * piece
  assert temporaries(functools.partial(fused_logprobs, config=config)) < 1.3 * piece
