import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.responses import LENGTH
from fixtures.strategies import corrupted, numbers, responses
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from segjax.rl import oracle, oracle_lm_rewards
from segjax.rl.lm_rewards import implicit_reward, pool, token_reward
from segjax.rl.losses import bradley_terry
from segjax.rl.segmentation import segment
from segjax.rl.spreads import dense_reward


def test_dpo_golden():
  """Two tokens each, at beta 0.1: rewards 0.1 (1 + 2) and 0.1 (-2 + 1), a difference of 0.4."""
  logprob = jnp.array([[-1.0, -1.0, 9.0], [-3.0, -1.0, 9.0]])
  ref_logprob = jnp.array([[-2.0, -3.0, 7.0], [-1.0, -2.0, 7.0]])
  mask = jnp.array([[True, True, False]] * 2)
  reward = implicit_reward(logprob, ref_logprob, mask, 0.1)
  assert_allclose(reward, [0.3, -0.1], rtol=1e-6)
  loss = bradley_terry(reward[:1], reward[1:])
  assert_allclose(loss, 0.5130152, rtol=1e-6)  # ln(1 + e^-0.4)
  # The other order has the loss ln(1 + e^0.4) = 0.9130152; one label in ten is wrong.
  assert_allclose(bradley_terry(reward[:1], reward[1:], 0.0, 0.1), 0.5530152, rtol=1e-6)


def test_token_rewards_golden():
  """The implicit kind at coef = clip = 0.05, the values of RTO, is bounded at 1 nat."""
  model, reference, policy = jnp.array([[-1, -2, -5], [-1.5, -5, -4], [-2, -2, -4.5]], jnp.float32)
  mask = jnp.array([True, True, True])
  reward = functools.partial(token_reward, model, reference, policy, mask)
  assert_allclose(reward(kind='implicit', coef=0.05, clip=0.05), [0.025, 0.05, -0.05], rtol=1e-6)
  assert_allclose(reward(kind='teacher', coef=1.0), [1, 0, -0.5])


def test_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="kind='critic' is unknown; use one of"):
    token_reward(*[jnp.zeros(2)] * 3, jnp.ones(2, bool), kind='critic', coef=1.0)


@functools.partial(jax.jit, static_argnames=('kind', 'clip'))
def rewards(logprobs, entropy, mask, finished, kind, clip):
  segments = segment(entropy, mask, finished, granularity='segment', entropy_threshold=2.0)
  reward = token_reward(*logprobs, mask, kind=kind, coef=0.3, clip=clip)
  pooled = pool(reward, segments)
  return reward, pooled, dense_reward(pooled, segments, mask), segments.segment_id >= 0


@given(responses(), numbers((3, LENGTH)), st.sampled_from([('implicit', None), ('teacher', 0.5)]))
def test_tokens_and_segments_equal_oracle(response, logprobs, options):
  entropy_after, entropy, mask, finished = response
  logprobs = [corrupted(x, mask) for x in logprobs]
  got, pooled, spread, inside = rewards(logprobs, entropy, mask, finished, *options)
  other = logprobs[1 if options[0] == 'implicit' else 2]
  rows = [x.tolist() for x in (logprobs[0], other, mask)]
  expected = oracle_lm_rewards.token_rewards(*rows, 0.3, options[1])
  assert_allclose(got, expected, atol=1e-6)
  ends = oracle.segment_ends(entropy_after.tolist(), mask.tolist(), bool(finished), 'segment', 2.0)
  spans = oracle.spans(ends, oracle.run_of(mask.tolist())[0])
  assert_allclose(pooled, oracle_lm_rewards.pooled(expected, spans), atol=1e-5)
  # Nothing is lost or added within the segments.
  assert_allclose(spread.sum(), np.asarray(got)[np.asarray(inside)].sum(), atol=1e-4)


@given(numbers((2, LENGTH)), responses(), st.floats(0.01, 2.0), st.sampled_from([0.0, 0.2]))
def test_dpo_equals_oracle(logprobs, response, beta, smoothing):
  mask, zeros = response[2], np.zeros(LENGTH, np.float32)
  rows = jnp.stack([logprobs[0], zeros]), jnp.stack([logprobs[1], zeros])
  reward = implicit_reward(*rows, jnp.stack([mask, mask]), beta)
  expected = oracle_lm_rewards.implicit_reward(*logprobs.tolist(), mask.tolist(), beta)
  assert_allclose(reward, [expected, 0], rtol=1e-4, atol=1e-4)
  loss = bradley_terry(reward[:1], reward[1:], 0.5, smoothing)
  if abs(expected) < 15:  # beyond, the oracle's probability rounds to 0 or 1
    assert_allclose(
      loss, oracle_lm_rewards.dpo_loss(expected, 0, 0.5, smoothing), rtol=1e-3, atol=1e-4
    )


def test_smoothed_loss_is_least_where_the_probability_is_that_of_the_label():
  gradient = jax.grad(lambda x: bradley_terry(x, jnp.zeros(1), 0.0, 0.2).sum())
  assert_allclose(gradient(jnp.array([math.log(4.0)])), 0, atol=1e-6)  # σ(ln 4) = 0.8
