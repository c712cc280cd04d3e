"""Low-rank adapters: the network with them, merged, side by side, and decoding."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import adapters, models

from segjax.model import heads, lora, sharding
from segjax.model.generate import generate, make_decode_config
from segjax.model.llama import RowLayout
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

IDS = models.ids()


@pytest.mark.parametrize('kind', [adapters.ALL, adapters.SOME], ids=['all', 'some'])
def test_merged_equals_unmerged(kind):
  params = models.params(models.CONFIG)
  with_adapter = params | adapters.adapter(params, kind)
  merged = lora.merge(with_adapter, kind)
  logprob = models.token_logprobs(with_adapter, IDS, config=adapters.config(kind))
  expected = models.token_logprobs(merged, IDS, config=models.CONFIG)
  plain = models.token_logprobs(params, IDS, config=models.CONFIG)
  for ours, theirs, base in zip(logprob, expected, plain, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(np.abs(theirs).max()))
    assert np.abs(np.asarray(ours - base)).max() > 0.1


def test_merge_is_the_equation():
  params = models.params(models.CONFIG)
  with_adapter = params | adapters.adapter(params, adapters.SOME)
  layers = lora.merge(with_adapter, adapters.SOME)['backbone']['layers']
  pair = with_adapter['adapter']['layers']['up']
  scale = 3.0 / np.sqrt(2)
  for layer in range(models.CONFIG.num_hidden_layers):
    change = scale * pair['a'][layer] @ pair['b'][layer]
    before = params['backbone']['layers']['up']['kernel'][layer]
    np.testing.assert_allclose(layers['up']['kernel'][layer], before + change, atol=1e-6)
  assert layers['key']['kernel'] is params['backbone']['layers']['key']['kernel']


def test_a_new_adapter_changes_no_bit():
  params = models.params(models.CONFIG)
  fresh = adapters.fresh(params)
  ours = models.token_logprobs(params | fresh, IDS, config=adapters.config())
  plain = models.token_logprobs(params, IDS, config=models.CONFIG)
  jax.tree.map(np.testing.assert_array_equal, ours, plain)
  bound = models.CONFIG.intermediate_size**-0.5
  down = np.asarray(fresh['adapter']['layers']['down']['a'])
  assert 0.8 * bound < np.abs(down).max() <= bound and abs(down.mean()) < 0.1 * bound
  assert not np.array_equal(down[0], down[1])
  # A matrix's first values do not depend on which others have adapters.
  some = adapters.fresh(params, dataclasses.replace(adapters.SOME, rank=4))
  np.testing.assert_array_equal(some['adapter']['layers']['down']['a'], down)


@pytest.mark.parametrize('devices', [1, pytest.param(8, marks=pytest.mark.devices)])
@pytest.mark.parametrize('packed', [False, True])
def test_networks_of_one_base_are_read_in_one_pass(packed, devices):
  """Each equals the network by itself: the base, and adapters of different ranks and matrices."""
  mesh = models.mesh(devices)
  base = models.params(models.CONFIG)
  head = {'scalar_head': models.params(models.CONFIG, 'scalar', 3)['scalar_head']}
  networks = [
    (base, models.CONFIG),
    (base | adapters.adapter(base), adapters.config()),
    (base | adapters.adapter(base, adapters.SOME, 1) | head, adapters.config(adapters.SOME)),
  ]
  rows = RowLayout()
  if packed:
    positions = np.tile(np.r_[np.arange(10), np.arange(14)], (models.BATCH, 1)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 14], models.BATCH, axis=0).astype(np.int32)
    rows = RowLayout(*sharding.place_batch((positions, segments), mesh))

  def shared(trees, ids, rows):
    pairs = [(tree, config) for tree, (_, config) in zip(trees, networks, strict=True)]
    hidden = heads.shared_hidden_states(pairs, ids, rows)
    logprobs = [
      heads.read_logprobs(hidden[i], trees[i], ids, networks[i][1], rows)[0] for i in range(2)
    ]
    return *logprobs, heads.read_scores(hidden[2], trees[2])

  def alone(trees, ids, rows):
    logprobs = [heads.token_logprobs(trees[i], ids, networks[i][1], rows)[0] for i in range(2)]
    return *logprobs, heads.scores(trees[2], ids, networks[2][1], rows)

  with jax.set_mesh(mesh):
    trees = [models.place(tree, mesh) for tree, _ in networks]
    arguments = trees, sharding.place_batch(IDS, mesh), rows
    for ours, expected in zip(jax.jit(shared)(*arguments), jax.jit(alone)(*arguments), strict=True):
      np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.campaign
@pytest.mark.parametrize('unrolled', [True, False], ids=['unrolled', 'scanned'])
def test_decoding_carries_adapters(unrolled):
  """Greedy tokens and their log-probs are those of the merged network."""
  params, config = models.params(models.CONFIG), adapters.config(adapters.HEADED)
  with_adapter = params | adapters.adapter(params, adapters.HEADED)
  prompts = PromptBatch(models.ids(seed=5, shape=(4, 6)), np.array([6, 2, 5, 3], np.int32))
  results = []
  for tree, network in ((with_adapter, config), (lora.merge(with_adapter, config.lora), None)):
    sampling = Sampling(temperature=0.0, max_new_tokens=8)
    decoder = make_decode_config(network or models.CONFIG, sampling, (7,), models.mesh(1))
    decoder = dataclasses.replace(decoder, unrolled=unrolled)
    results.append(generate(tree, prompts, jax.random.key(0), decoder=decoder, mesh=models.mesh(1)))
  np.testing.assert_array_equal(results[0].response_ids, results[1].response_ids)
  np.testing.assert_allclose(results[0].logprob, results[1].logprob, atol=1e-4)


@pytest.mark.campaign
def test_a_frozen_head_has_no_gradient_in_the_program():
  """Of the kernel of the vocabulary the backward pass multiplies with hidden states alone."""
  params = models.params(models.CONFIG)
  trained = adapters.adapter(params)

  def loss(trained, base):
    return models.token_logprobs(base | trained, IDS, config=adapters.config())[0].sum()

  of_adapter = jax.grad(loss)(trained, params)
  of_all = jax.grad(lambda tree: loss(tree, {}))(params | trained)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
    of_adapter,
    {'adapter': of_all['adapter']},
  )
  text = str(jax.make_jaxpr(jax.grad(loss))(trained, params))
  width, vocabulary = models.CONFIG.hidden_size, models.CONFIG.vocab_size
  assert f'f32[{width},{vocabulary}] = broadcast_in_dim' not in text
  headed = {'adapter': trained['adapter'], 'lm_head': params['lm_head']}  # trained with them
  np.testing.assert_allclose(
    jax.grad(loss)(headed, params)['lm_head']['kernel'],
    of_all['lm_head']['kernel'],
    rtol=2e-4,
    atol=2e-4,
  )
  full = str(jax.make_jaxpr(jax.grad(lambda tree: loss(tree, {})))(params | trained))
  assert f'f32[{width},{vocabulary}] = broadcast_in_dim' in full
