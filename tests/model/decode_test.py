import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segjax.model.decode import Sampling, filtered, generate

from . import tiny

PROMPT, RESPONSE = 8, 16
LENGTHS = np.array([1, 8, 3, 5, 8, 2, 7, 4], np.int32)
SAMPLING = Sampling(max_new_tokens=RESPONSE)


def run(params, prompts, lengths, seed=0, *, config=tiny.CONFIG, sampling=SAMPLING):
  out = generate(
    params,
    jnp.asarray(prompts),
    jnp.asarray(lengths),
    jax.random.key(seed),
    config=config,
    sampling=sampling,
    stop_ids=tiny.STOP_IDS,
  )
  return jax.device_get(out)


def joined(prompts, lengths, response_ids):
  """Prompt and response of each row, without a gap."""
  ids = np.zeros((len(prompts), PROMPT + RESPONSE), np.int32)
  for row, length in enumerate(lengths):
    ids[row, :length] = prompts[row, :length]
    ids[row, length : length + RESPONSE] = response_ids[row]
  return ids


@pytest.fixture(scope='module', params=tiny.CONFIGS)
def sampled(request):
  """A batch of responses, some of them finished, and what they came from."""
  config = tiny.CONFIGS[request.param]
  params, prompts = tiny.params(config), tiny.ids(shape=(tiny.BATCH, PROMPT))
  return config, params, prompts, run(params, prompts, LENGTHS, config=config)


def test_logprob_equals_full_forward(sampled):
  config, params, prompts, out = sampled
  ids = joined(prompts, LENGTHS, out.response_ids)
  full, _ = tiny.token_logprobs(params, ids, config)
  for row, length in enumerate(LENGTHS):
    n = out.response_mask[row].sum()
    # The cache holds the same numbers, summed in another order: float32.
    expected = full[row, length : length + n]
    assert_allclose(out.logprob[row, :n], expected, rtol=0, atol=1e-4)


def test_what_a_response_is(sampled):
  _, _, _, out = sampled
  assert 0 < out.finished.sum() < tiny.BATCH  # both kinds are here
  for ids, mask, finished, logprob in zip(
    out.response_ids, out.response_mask, out.finished, out.logprob, strict=True
  ):
    n = mask.sum()
    assert n and mask[:n].all()
    stops = np.isin(ids[:n], tiny.STOP_IDS)
    assert not stops[:-1].any()
    assert stops[-1] == finished  # the stop token is part of the response
    assert finished or n == RESPONSE
    assert (ids[n:] == tiny.STOP_IDS[0]).all()
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
  assert ends == set(tiny.STOP_IDS)


def test_a_row_depends_on_itself_alone(sampled):
  """Not on its batch mates, nor on what its prompt is padded with."""
  config, params, prompts, out = sampled
  others, lengths = tiny.ids(seed=5, shape=prompts.shape), LENGTHS[::-1].copy()
  for row in (0, 3):
    real = np.arange(PROMPT) < LENGTHS[row]
    others[row], lengths[row] = np.where(real, prompts[row], 9), LENGTHS[row]
  again = run(params, others, lengths, config=config)
  for row in (0, 3):
    assert_allclose(again.response_ids[row], out.response_ids[row])
    assert_allclose(again.logprob[row], out.logprob[row], atol=1e-5)  # float32
  assert (again.response_ids[1] != out.response_ids[1]).any()


def test_the_key_decides(sampled):
  config, params, prompts, out = sampled
  again = run(params, prompts, LENGTHS, config=config)
  jax.tree.map(np.testing.assert_array_equal, again, out)
  other = run(params, prompts, LENGTHS, seed=1, config=config)
  assert (other.response_ids != out.response_ids).any(axis=1).all()
  same = run(params, np.tile(prompts[:1], (8, 1)), np.full(8, 1, np.int32), config=config)
  assert len(np.unique(same.response_ids[:, 0])) > 2  # rows draw apart


def test_greedy_takes_the_likeliest_token_of_the_full_forward():
  config, prompts = tiny.TIED, tiny.ids(seed=3, shape=(tiny.BATCH, PROMPT))
  params = tiny.params(config, seed=4)
  # Larger logits of the stop tokens, so that they win at times.
  scale = jnp.ones((tiny.VOCAB, 1)).at[jnp.array(tiny.STOP_IDS)].set(2.0)
  params['backbone']['embedding'] *= jnp.broadcast_to(scale, (tiny.VOCAB, 32))
  sampling = Sampling(temperature=0.0, min_new_tokens=3, max_new_tokens=RESPONSE)
  out = run(params, prompts, LENGTHS, config=config, sampling=sampling)

  response = np.zeros((tiny.BATCH, RESPONSE), np.int32)
  live, mask = np.ones(tiny.BATCH, bool), []
  banned = 0
  for t in range(RESPONSE):
    logits = tiny.logits(params, joined(prompts, LENGTHS, response), config)
    logits = np.array(logits)[np.arange(tiny.BATCH), LENGTHS - 1 + t]
    if t < 3:
      banned += np.isin(logits.argmax(axis=1), tiny.STOP_IDS).sum()
      logits[:, list(tiny.STOP_IDS)] = -np.inf
    response[:, t] = np.where(live, logits.argmax(axis=1), tiny.STOP_IDS[0])
    mask.append(live)
    live = live & ~np.isin(response[:, t], tiny.STOP_IDS)
  np.testing.assert_array_equal(out.response_ids, response)
  np.testing.assert_array_equal(out.response_mask, np.stack(mask, axis=1))
  np.testing.assert_array_equal(out.finished, ~live)
  assert banned  # min_new_tokens had something to forbid


def oracle_filter(logits, temperature, top_k, top_p):
  """Probabilities after temperature, top-k and nucleus, by sorting."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-logits, kind='stable')
  kept = order[: top_k or len(order)]
  probs = np.exp(logits[kept] - logits.max())
  probs /= probs.sum()
  enough = np.searchsorted(np.cumsum(probs), top_p - 1e-9) + 1 if top_p < 1 else len(probs)
  result = np.zeros(len(logits))
  result[kept[:enough]] = probs[:enough] / probs[:enough].sum()
  return result


@pytest.mark.parametrize(
  ('top_k', 'top_p'),
  [(0, 1.0), (1, 1.0), (5, 1.0), (200, 1.0), (0, 0.05), (0, 0.6), (0, 0.999), (20, 0.7), (3, 0.99)],
)
def test_filter_equals_sorting(top_k, top_p):
  scale = np.repeat([0.1, 1.0, 4.0, 12.0], 16)[:, None]
  logits = scale * np.random.default_rng(0).normal(size=(64, tiny.VOCAB))
  logits[::3, 5:9] = -np.inf  # banned
  logits = logits.astype(np.float32)
  sampling = Sampling(top_k=top_k, top_p=top_p)
  got = jax.nn.softmax(jax.jit(filtered, static_argnums=1)(logits, sampling), axis=-1)
  expected = np.stack([oracle_filter(row, 1.0, top_k, top_p) for row in logits])
  np.testing.assert_array_equal(np.asarray(got) > 1e-12, expected > 1e-12)
  assert_allclose(got, expected, atol=1e-5)  # float32


def test_filter_keeps_ties():
  """Equal logits at the edge are all kept: nothing says which should go."""
  logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
  kept = jnp.isfinite(filtered(logits, Sampling(top_k=2)))
  assert kept.tolist() == [[True, True, True, False, False]]
  kept = jnp.isfinite(filtered(logits, Sampling(top_p=0.5)))
  assert kept.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize(
  'sampling',
  [
    Sampling(max_new_tokens=1, min_new_tokens=0),
    Sampling(max_new_tokens=1, min_new_tokens=1),
    Sampling(max_new_tokens=1, min_new_tokens=1, temperature=0.7, top_k=40, top_p=0.8),
  ],
  ids=['plain', 'stops_banned', 'filtered'],
)
def test_samples_follow_the_distribution(sampling):
  """Chi-square of 8192 first tokens after one prompt of one token; the key is fixed."""
  params, rows = tiny.params(tiny.CONFIG, seed=2), 8192
  prompts = np.full((rows, 1), 17, np.int32)
  out = run(params, prompts, np.ones(rows, np.int32), sampling=sampling)
  logits = np.array(tiny.logits(params, prompts[:8], tiny.CONFIG)[0, 0])
  plain = oracle_filter(logits, 1.0, 0, 1.0)
  if sampling.min_new_tokens:
    logits[list(tiny.STOP_IDS)] = -np.inf
  expected = oracle_filter(logits, sampling.temperature, sampling.top_k, sampling.top_p)
  count = np.bincount(out.response_ids[:, 0], minlength=tiny.VOCAB)
  assert (count[expected == 0] == 0).all()
  # The rarest tokens together, for counts below 5 are not normal.
  rare = expected * rows < 5
  cells = np.append(expected[~rare], expected[rare].sum()) * rows
  counts = np.append(count[~rare], count[rare].sum())
  cells, counts = cells[cells > 0], counts[cells > 0]
  freedom = len(cells) - 1
  chi_square = np.sum((counts - cells) ** 2 / cells)
  assert freedom > 5
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations
  # What is reported is the log-prob without filter, temperature or ban.
  assert_allclose(out.logprob[:, 0], np.log(plain)[out.response_ids[:, 0]], atol=1e-4)


def test_bfloat16_decodes_near_its_own_forward():
  """The policy in bfloat16: its decode loop and its forward round alike, within bfloat16."""
  config = dataclasses.replace(tiny.CONFIG, dtype='bfloat16')
  params, prompts = tiny.params(config), tiny.ids(shape=(tiny.BATCH, PROMPT))
  out = run(params, prompts, LENGTHS, config=config)
  assert out.logprob.dtype == np.float32
  full, _ = tiny.token_logprobs(params, joined(prompts, LENGTHS, out.response_ids), config)
  window = functools.partial(np.take_along_axis, axis=1)
  full = window(np.asarray(full), LENGTHS[:, None] + np.arange(RESPONSE)[None])
  difference = np.abs(np.where(out.response_mask, full - out.logprob, 0))
  assert difference.max() < 0.3
  assert difference[out.response_mask].mean() < 0.03
