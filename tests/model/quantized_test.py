"""Weights in int8: the bound of their error, products, networks and rollouts of them."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import chips, models, training
from numpy.testing import assert_allclose, assert_array_equal

from segjax.model import quantized, sharding
from segjax.model.decode_weights import decode_weights
from segjax.model.generate import make_decode_config
from segjax.model.mesh import decode_mesh, make_mesh
from segjax.model.sampling import Sampling
from segjax.train.rollout_rows import concat_prompt_response, gather_response


def kernel_of_columns():
  """Returns a kernel [2, 16, 6]: columns of sizes from 1e-6 to 1e6, one of zeros."""
  kernel = np.random.default_rng(3).normal(size=(2, 16, 6)) * 10.0 ** np.array([-6, -3, 0, 3, 6, 0])
  kernel[..., 5] = 0
  return kernel.astype(np.float32)


def rounded(params):
  """Returns the parameters with q · scale in place of the matrices of the layers."""
  layers = dict(quantized.quantize_layers(params)['backbone']['layers'])
  for name, module in layers.items():
    if module.get('kernel') is not None:
      scale = module['scale'][:, None]
      layers[name] = {**module, 'kernel': module['kernel'].astype(jnp.float32) * scale}
      del layers[name]['scale']
  return {**params, 'backbone': {**params['backbone'], 'layers': layers}}


def test_error_is_at_most_half_a_step():
  kernel = kernel_of_columns()
  q, scale = jax.device_get(quantized.quantize(jnp.asarray(kernel)))
  assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (2, 6)
  assert_allclose(scale, np.abs(kernel).max(axis=1) / 127, rtol=1e-6)
  error = np.abs(kernel - q.astype(np.float64) * scale[:, None])
  assert (error <= 0.5001 * scale[:, None]).all()
  # All steps are used: the largest weight of a column is the last one.
  assert_array_equal(np.abs(q).max(axis=1), [[127] * 5 + [0]] * 2)
  assert not q[..., 5].any() and not scale[:, 5].any()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_corrupted_column_stays_corrupted(value):
  kernel = kernel_of_columns()[0]
  kernel[3, 2] = value
  q, scale = quantized.quantize(jnp.asarray(kernel))
  y = np.asarray(quantized.product(jnp.ones((1, 16)), q, scale))
  assert_array_equal(np.isfinite(y), [[True, True, False, True, True, True]])


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 2**-8)])
def test_product_equals_loops(dtype, tolerance):
  """In bfloat16 only the factor x and the result are rounded: int8 is exact, sums are wide."""
  x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 16)), dtype)
  q, scale = quantized.quantize(jnp.asarray(kernel_of_columns()[0]))
  got = quantized.product(x, q, scale)
  assert got.dtype == dtype
  expected, size = np.zeros((3, 6)), np.zeros((3, 6))
  for row, column in np.ndindex(3, 6):
    for i in range(16):
      term = float(x[row, i]) * int(q[i, column]) * float(scale[column])
      expected[row, column] += term
      size[row, column] += abs(term)
  assert (np.abs(np.asarray(got, np.float64) - expected) <= tolerance * size).all()


@pytest.mark.campaign
def test_network_is_that_of_the_rounded_weights():
  """And near that of the weights themselves."""
  config, ids = models.TIED, models.ids()
  params = models.params(config)
  exact, _ = models.token_logprobs(params, ids, config)
  expected, _ = models.token_logprobs(rounded(params), ids, config)
  got, _ = models.token_logprobs(quantized.quantize_layers(params), ids, config)
  assert_allclose(got, expected, atol=1e-4)
  error = np.abs(np.asarray(got - exact))
  assert 1e-3 < error.mean() < 0.1


def test_only_matrices_of_layers_are_rounded():
  params = models.params(models.TIED)
  tree = quantized.quantize_layers(params)
  added = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = sharding.path_name(path)
    original = params
    for part in name.split('/'):
      original = original.get(part, {})
    if leaf is not original:
      added[name] = leaf.dtype
  matrices = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')
  assert added == {
    f'backbone/layers/{name}/{leaf}': jnp.dtype(dtype)
    for name in matrices
    for leaf, dtype in (('kernel', 'int8'), ('scale', 'float32'))
  }


@pytest.mark.parametrize('unrolled', [True, False])
def test_decode_weights_on_a_mesh_of_their_own(unrolled):
  """Int8 crosses the devices: the same numbers, split by columns or rows over a group."""
  mesh = models.mesh(8)
  params = models.params(models.CONFIG)
  decoder = make_decode_config(models.CONFIG, Sampling(), models.STOP_IDS, models.mesh(1))
  decoder = dataclasses.replace(decoder, weights_dtype='int8', unrolled=unrolled)
  placed = models.place(params, mesh)
  with jax.set_mesh(decode_mesh(mesh, models.CONFIG.num_key_value_heads, 2)):
    layers = decode_weights(placed, decoder=decoder).layers
  expected = quantized.quantize_layers(params)['backbone']['layers']
  if unrolled:
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
  layers = layers['params']
  if not unrolled:
    # Each device scales its own columns, or sums over rows; nothing is exchanged for a scale.
    for name, columns in (('query', 16), ('gate', 24), ('output', 32), ('down', 32)):
      module = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, layers[name])
      kernel, scale = module['kernel'], module['scale']
      assert kernel.shape[-1] == scale.shape[-1] == columns
  jax.tree.map(assert_array_equal, layers, expected)


@pytest.mark.compiled
@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_int8_is_converted_inside_the_product(platform):
  """Compilers for H100 and v5p write no bfloat16 copy of a matrix of Llama-3-8B, 117 MB."""
  shapes = ((128, 4096), 'bfloat16'), ((4096, 14336), 'int8'), ((14336,), 'float32')
  arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  memory = chips.compile_for(platform, quantized.product, *arguments).memory_analysis()
  assert memory.temp_size_in_bytes < 20e6


@pytest.mark.compiled
def test_only_rounded_weights_cross_devices():
  """And the columns' largest weights, which all devices must know; not the stored weights."""
  training_mesh = make_mesh(data=1, fsdp=8, tensor=1)
  decoder = make_decode_config(models.CONFIG, Sampling(), models.STOP_IDS, models.mesh(1))
  decoder = dataclasses.replace(decoder, weights_dtype='int8')
  params = models.place(models.params(models.CONFIG), training_mesh)
  lay_out = jax.jit(decode_weights, static_argnames='decoder')
  with jax.set_mesh(decode_mesh(training_mesh, 4, models.CONFIG.num_key_value_heads)):
    text = lay_out.lower(params, decoder=decoder).compile().as_text()
  pattern = r'= \(?(s8|f32)\[2,([\d,]+)\].* (?:all-to-all|all-gather|collective-permute)\('
  moved = {'s8': 0, 'f32': 0}  # elements of the largest array, for each of the two layers
  for dtype, shape in re.findall(pattern, text):
    moved[dtype] = max(moved[dtype], math.prod(map(int, shape.split(','))))
  assert moved['f32'] <= models.CONFIG.intermediate_size < moved['s8']


@pytest.mark.campaign
def test_responses_are_drawn_from_the_rounded_weights():
  """Their log-probs are those of a full forward pass of q · scale."""
  params = training.network('policy', models.mesh(1))
  sampled = training.sample(params, weights_dtype='int8').arrays
  assert not np.array_equal(sampled.response_ids, training.sample(params).response_ids)
  logprob, _ = models.token_logprobs(
    rounded(params), concat_prompt_response(sampled), models.CONFIG
  )
  expected = gather_response(logprob, sampled.prompt_length, sampled.response_ids.shape[1])
  mask = sampled.response_mask
  assert_allclose(sampled.old_logprob[mask], expected[mask], atol=1e-4)
