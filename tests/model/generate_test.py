import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models
from fixtures.compiles import compiled
from numpy.testing import assert_allclose

from segjax.model.generate import GenerationOptions, generate, make_decode_config
from segjax.model.mesh import decode_mesh, make_mesh
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

from .sampling_test import oracle_filter

PROMPT, RESPONSE = 8, 16
LENGTHS = np.array([1, 8, 3, 5, 8, 2, 7, 4], np.int32)
SAMPLING = Sampling(max_new_tokens=RESPONSE)


def run(params, prompts, lengths, seed=0, *, config=models.CONFIG, sampling=SAMPLING, **values):
  mesh, tensor = values.pop('mesh', None) or models.mesh(1), values.pop('tensor', 0)
  return generate(
    params,
    PromptBatch(np.asarray(prompts), np.asarray(lengths)),
    jax.random.key(seed),
    decoder=make_decode_config(config, sampling, models.STOP_IDS, mesh, tensor=tensor),
    mesh=mesh,
    options=GenerationOptions(**values),
  )


def joined(prompts, lengths, response_ids):
  """Prompt and response of each row, without a gap."""
  ids = np.zeros((len(prompts), PROMPT + RESPONSE), np.int32)
  for row, length in enumerate(lengths):
    ids[row, :length] = prompts[row, :length]
    ids[row, length : length + RESPONSE] = response_ids[row]
  return ids


@pytest.fixture(scope='module', params=['untied', pytest.param('tied', marks=pytest.mark.campaign)])
def sampled(request):
  """(config, params, prompts, result) of a batch of responses, some of them finished."""
  config = models.CONFIGS[request.param]
  params, prompts = models.params(config), models.ids(shape=(models.BATCH, PROMPT))
  return config, params, prompts, run(params, prompts, LENGTHS, config=config)


def test_logprob_equals_full_forward(sampled):
  config, params, prompts, out = sampled
  ids = joined(prompts, LENGTHS, out.response_ids)
  full, _ = models.token_logprobs(params, ids, config)
  for row, length in enumerate(LENGTHS):
    n = out.response_mask[row].sum()
    # The cache holds the same numbers, summed in another order: float32.
    expected = full[row, length : length + n]
    assert_allclose(out.logprob[row, :n], expected, rtol=0, atol=1e-4)


def test_responses_end_at_the_first_stop_token(sampled):
  _, _, _, out = sampled
  assert 0 < out.finished.sum() < models.BATCH  # both kinds occur
  for ids, mask, finished, logprob in zip(
    out.response_ids, out.response_mask, out.finished, out.logprob, strict=True
  ):
    n = mask.sum()
    assert n and mask[:n].all()
    stops = np.isin(ids[:n], models.STOP_IDS)
    assert not stops[:-1].any()
    assert stops[-1] == finished  # the stop token is part of the response
    assert finished or n == RESPONSE
    assert (ids[n:] == models.STOP_IDS[0]).all()
    assert (logprob[n:] == 0).all()
    assert (logprob[:n] < 0).all()


def test_each_stop_id_stops(sampled):
  config, params, prompts, out = sampled
  ends = set()
  for seed in range(12):
    out = run(params, prompts, LENGTHS, seed, config=config)
    last = out.response_mask.sum(axis=1) - 1
    tokens = np.take_along_axis(out.response_ids, last[:, None], axis=1)[:, 0]
    ends |= set(tokens[out.finished].tolist())
  assert ends == set(models.STOP_IDS)


def test_rows_are_independent(sampled):
  """A response depends neither on its batch mates nor on the padding of its prompt."""
  config, params, prompts, out = sampled
  others, lengths = models.ids(seed=5, shape=prompts.shape), LENGTHS[::-1].copy()
  for row in (0, 3):
    real = np.arange(PROMPT) < LENGTHS[row]
    others[row], lengths[row] = np.where(real, prompts[row], 9), LENGTHS[row]
  again = run(params, others, lengths, config=config)
  for row in (0, 3):
    assert_allclose(again.response_ids[row], out.response_ids[row])
    assert_allclose(again.logprob[row], out.logprob[row], atol=1e-5)  # float32
  assert (again.response_ids[1] != out.response_ids[1]).any()


def test_responses_depend_on_the_key(sampled):
  config, params, prompts, out = sampled
  again = run(params, prompts, LENGTHS, config=config)
  jax.tree.map(np.testing.assert_array_equal, again, out)
  reseeded = run(params, prompts, LENGTHS, seed=1, config=config)
  assert (reseeded.response_ids != out.response_ids).any(axis=1).all()
  same = run(params, np.tile(prompts[:1], (8, 1)), np.full(8, 1, np.int32), config=config)
  assert len(np.unique(same.response_ids[:, 0])) > 2  # rows draw apart


def test_greedy_takes_the_likeliest_token_of_the_full_forward():
  config, prompts = models.TIED, models.ids(seed=3, shape=(models.BATCH, PROMPT))
  params = models.params(config, seed=4)
  # Larger logits of the stop tokens, so that they win at times.
  scale = jnp.ones((models.VOCAB, 1)).at[jnp.array(models.STOP_IDS)].set(2.0)
  params['backbone']['embedding'] *= jnp.broadcast_to(scale, (models.VOCAB, 32))
  sampling = Sampling(temperature=0.0, min_new_tokens=3, max_new_tokens=RESPONSE)
  out = run(params, prompts, LENGTHS, config=config, sampling=sampling)

  response = np.zeros((models.BATCH, RESPONSE), np.int32)
  active, mask = np.ones(models.BATCH, bool), []
  banned = 0
  for t in range(RESPONSE):
    logits = models.logits(params, joined(prompts, LENGTHS, response), config)
    logits = np.array(logits)[np.arange(models.BATCH), LENGTHS - 1 + t]
    if t < 3:
      banned += np.isin(logits.argmax(axis=1), models.STOP_IDS).sum()
      logits[:, list(models.STOP_IDS)] = -np.inf
    response[:, t] = np.where(active, logits.argmax(axis=1), models.STOP_IDS[0])
    mask.append(active)
    active = active & ~np.isin(response[:, t], models.STOP_IDS)
  np.testing.assert_array_equal(out.response_ids, response)
  np.testing.assert_array_equal(out.response_mask, np.stack(mask, axis=1))
  np.testing.assert_array_equal(out.finished, ~active)
  assert banned  # min_new_tokens changed at least one token


@pytest.mark.parametrize(
  'sampling',
  [
    Sampling(max_new_tokens=1, min_new_tokens=0),
    pytest.param(Sampling(max_new_tokens=1, min_new_tokens=1), marks=pytest.mark.campaign),
    pytest.param(
      Sampling(max_new_tokens=1, min_new_tokens=1, temperature=0.7, top_k=40, top_p=0.8),
      marks=pytest.mark.campaign,
    ),
  ],
  ids=['plain', 'stops_banned', 'filtered'],
)
def test_samples_follow_the_distribution(sampling):
  """Chi-square of 8192 first tokens after one prompt of one token; the key is fixed."""
  params, rows = models.params(models.CONFIG, seed=2), 8192
  prompts = np.full((1, 1), 17, np.int32)
  out = run(params, prompts, np.ones(1, np.int32), sampling=sampling, samples_per_prompt=rows)
  logits = np.array(models.logits(params, np.tile(prompts, (8, 1)), models.CONFIG)[0, 0])
  plain = oracle_filter(logits, 1.0, 0, 1.0)
  if sampling.min_new_tokens:
    logits[list(models.STOP_IDS)] = -np.inf
  expected = oracle_filter(logits, sampling.temperature, sampling.top_k, sampling.top_p)
  count = np.bincount(out.response_ids[:, 0], minlength=models.VOCAB)
  assert (count[expected == 0] == 0).all()
  # The rarest tokens are pooled: counts below 5 are not close to normal.
  rare = expected * rows < 5
  cells = np.append(expected[~rare], expected[rare].sum()) * rows
  counts = np.append(count[~rare], count[rare].sum())
  cells, counts = cells[cells > 0], counts[cells > 0]
  freedom = len(cells) - 1
  chi_square = np.sum((counts - cells) ** 2 / cells)
  assert freedom > 5
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations
  # `logprob` is without filter, temperature or ban;
  assert_allclose(out.logprob[:, 0], np.log(plain)[out.response_ids[:, 0]], atol=1e-4)
  # `sample_logprob` is of the distribution drawn from.
  assert_allclose(out.sample_logprob[:, 0], np.log(expected[out.response_ids[:, 0]]), atol=1e-4)


@pytest.mark.campaign
def test_bfloat16_decodes_near_its_own_forward():
  """In bfloat16, the decode loop and the full forward agree within its rounding."""
  config = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  params, prompts = models.params(config), models.ids(shape=(models.BATCH, PROMPT))
  out = run(params, prompts, LENGTHS, config=config)
  assert out.logprob.dtype == np.float32
  full, _ = models.token_logprobs(params, joined(prompts, LENGTHS, out.response_ids), config)
  window = functools.partial(np.take_along_axis, axis=1)
  full = window(np.asarray(full), LENGTHS[:, None] + np.arange(RESPONSE)[None])
  difference = np.abs(np.where(out.response_mask, full - out.logprob, 0))
  assert difference.max() < 0.3
  assert difference[out.response_mask].mean() < 0.03


@pytest.mark.parametrize('slots', [pytest.param(1, marks=pytest.mark.campaign), 3])
def test_responses_do_not_depend_on_max_concurrent(sampled, slots):
  """One slot, refilled seven times, or eight at once: the same tokens."""
  config, params, prompts, out = sampled
  again = run(params, prompts, LENGTHS, config=config, max_concurrent=slots)
  np.testing.assert_array_equal(again.response_ids, out.response_ids)
  np.testing.assert_array_equal(again.finished, out.finished)
  for name in ('logprob', 'sample_logprob'):
    assert_allclose(getattr(again, name), getattr(out, name), atol=1e-5, err_msg=name)


def test_responses_do_not_depend_on_the_order_of_prompts(sampled):
  config, params, prompts, out = sampled
  order = np.random.default_rng(2).permutation(models.BATCH)
  again = run(
    params, prompts[order], LENGTHS[order], config=config, max_concurrent=3, prompt_index=order
  )
  np.testing.assert_array_equal(again.response_ids, out.response_ids[order])
  assert_allclose(again.logprob, out.logprob[order], atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'tensor'),
  [
    ((2, 2, 2), 2),
    pytest.param((4, 2, 1), 2, marks=pytest.mark.devices),
    pytest.param((1, 8, 1), 1, marks=pytest.mark.devices),
    pytest.param((1, 1, 8), 1, marks=pytest.mark.devices),
  ],
  ids=str,
)
def test_responses_do_not_depend_on_devices(shape, tensor):
  """Groups of rows, each with a pool of pages of its own, and heads over the devices of a group."""
  params, prompts = models.params(models.CONFIG), models.ids(shape=(models.BATCH, PROMPT))
  out = run(params, prompts, LENGTHS)
  mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  assert decode_mesh(mesh, 4, 2, tensor).shape['data'] == 8 // tensor
  with jax.set_mesh(mesh):
    placed = models.place(params, mesh)
  again = run(placed, prompts, LENGTHS, mesh=mesh, max_concurrent=5, tensor=tensor)
  np.testing.assert_array_equal(again.response_ids, out.response_ids)
  assert_allclose(again.logprob, out.logprob, atol=1e-5)


def test_limits_end_each_response(sampled):
  config, params, prompts, out = sampled
  limits = np.array([1, 2, 3, 16, 16, 4, 5, 99])
  again = run(params, prompts, LENGTHS, config=config, max_concurrent=2, limits=limits)
  length = out.response_mask.sum(axis=1)
  np.testing.assert_array_equal(again.response_mask.sum(axis=1), np.minimum(length, limits))
  mask = again.response_mask
  np.testing.assert_array_equal(again.response_ids[mask], out.response_ids[mask])
  np.testing.assert_array_equal(again.finished, out.finished & (length <= limits))


@pytest.mark.campaign
def test_scanned_layers_equal_unrolled_ones():
  """Accelerators scan the layers."""
  params, prompts = models.params(models.CONFIG), models.ids(shape=(models.BATCH, PROMPT))
  mesh = models.mesh(1)
  decoder = make_decode_config(models.CONFIG, SAMPLING, models.STOP_IDS, mesh)
  results = [
    generate(
      params,
      PromptBatch(prompts, LENGTHS),
      jax.random.key(0),
      decoder=dataclasses.replace(decoder, unrolled=unrolled, chunk=chunk),
      mesh=mesh,
      options=GenerationOptions(max_concurrent=3),
    )
    for unrolled, chunk in ((True, 16), (False, 16), (True, 5))
  ]
  for result in results[1:]:
    np.testing.assert_array_equal(result.response_ids, results[0].response_ids)
    assert_allclose(result.logprob, results[0].logprob, atol=1e-5)


def test_nothing_compiles_after_the_first_call(caplog):
  params = models.params(models.CONFIG)
  prompts = models.ids(shape=(models.BATCH, PROMPT))
  run(params, prompts, LENGTHS, max_concurrent=4)
  with compiled(caplog) as names:
    for seed in range(1, 4):
      prompts, lengths = models.ids(seed=seed, shape=prompts.shape), np.roll(LENGTHS, seed)
      run(params, prompts, lengths, seed=seed, max_concurrent=4)
  assert names == []


def test_stop_ids_are_tokens():
  with pytest.raises(ValueError, match='stop id 80 is outside the vocabulary of 80'):
    make_decode_config(models.CONFIG, SAMPLING, (3, 80), models.mesh(1))
