import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl.normalizer import PUBLISHED, normalize
from segjax.rl.rewards import SPREADS, dense_reward, shaped_reward
from segjax.rl.segmentation import GRANULARITIES, segment
from segjax.types import Normalizer

from .normalizer_test import GOLDEN_NAMES, fields
from .ragged import LENGTH, from_previous, make_batch, padded

# How the golden file names the ways to spread.
GOLDEN_SPREADS = {
  'segment_normalization': 'even_split',
  'same_segment_last': 'repeat',
  'every_segment_last': 'end_only',
}

VALUES = [0.5, 1, -0.25, 2, 0.75, 1.5, -3, 7, 7]
ENTROPY_AFTER = np.array([2.4, 0.2, 1.9, 2.2, 0.1, 0.6, 2.8, 9, 9], np.float32)
MASK = jnp.arange(9) <= 6  # the stop token is at 6


@functools.partial(jax.jit, static_argnames=('granularity', 'spread', 'length_norm'))
def worked(threshold, normalizer, granularity='segment', **settings):
  entropy = jnp.asarray(from_previous(ENTROPY_AFTER))
  segments = segment(
    entropy, MASK, jnp.array(True), granularity=granularity, entropy_threshold=threshold
  )
  z = normalize(jnp.array(VALUES), segments, normalizer, None)
  return dense_reward(z, segments, MASK, **settings)


PHI = PUBLISHED['phi3_mini_instruct/segment@1.75']
PHI_TOKEN = PUBLISHED['phi3_mini_instruct/token']
TOKEN_REWARD = [0.330942, 0.248428, -0.270067, 0.328290, -0.106709, 0.059504, 0, 0, 0]


@pytest.mark.parametrize(
  ('spread', 'expected'),
  [
    # Segments of 1, 2, 1, 2 tokens with z .440927, -.071162, .634094, .363280.
    ('even_split', [0.440927, -0.035581, -0.035581, 0.634094, 0.181640, 0.181640, 0, 0, 0]),
    ('repeat', [0.440927, -0.071162, -0.071162, 0.634094, 0.363280, 0.363280, 0, 0, 0]),
    ('end_only', [0.440927, 0, -0.071162, 0.634094, 0, 0.363280, 0, 0, 0]),
  ],
)
def test_worked_segments(spread, expected):
  assert_allclose(worked(1.75, PHI, spread=spread), expected, atol=2e-6)  # as printed


@pytest.mark.parametrize('spread', ['even_split', 'repeat', 'end_only'])
@pytest.mark.parametrize('granularity', ['token', 'segment'])
def test_worked_tokens(spread, granularity):
  got = worked(0.0, PHI_TOKEN, granularity, spread=spread)
  assert_allclose(got, TOKEN_REWARD, atol=2e-6)


def test_worked_length_norm():
  got = worked(0.0, PUBLISHED['llama3_8b_sft/token'], 'token', length_norm=True)
  expected = [0.088818, 0.051858, -0.011072, 0.039094, -0.006913, 0.004686, 0, 0, 0]
  assert_allclose(got, expected, atol=2e-6)


def test_worked_no_normalizer():
  got = worked(2.0, Normalizer())
  assert_allclose(got, [0.5, 2 / 3, 2 / 3, 2 / 3, 0.75, 0.75, 0, 0, 0], rtol=1e-6)


def test_worked_bandit():
  normalizer = PUBLISHED['phi3_mini_instruct/bandit']
  got = worked(2.0, normalizer, 'bandit', spread='bandit')
  assert_allclose(got, [0, 0, 0, 0, 0, 0, -1.1503623, 0, 0], rtol=1e-6)


def test_worked_kl_and_clamp():
  dense = jnp.array([0.25, -0.1, 0.4, 12, 0, 0])
  kl = jnp.array([0.2, -0.5, 0, 1, 0.2, -4])  # the last is under the mask
  mask = jnp.arange(6) < 5
  expected = [0.248, -0.095, 0.4, 9.99, -0.002, 0]
  assert_allclose(shaped_reward(dense, kl, mask, kl_coef=0.01), expected, atol=1e-6)
  assert_allclose(shaped_reward(dense, kl, mask, kl_coef=-1.0)[:4], [0.25, -0.1, 0.4, 10])
  assert_allclose(shaped_reward(dense, kl, mask, kl_coef=0, clip=0.2)[:4], [0.2, -0.1, 0.2, 0.2])


def test_golden_file(material):
  cases = json.loads((material / 'spec' / 'golden.json').read_text())['dense']
  normalizers = [PUBLISHED[GOLDEN_NAMES[case['model'], case['thr']]] for case in cases]

  @jax.jit
  @jax.vmap
  def run(score, entropy, mask, threshold, parameters):
    # Their token runs merge tokens of entropy exactly 0: threshold 0, not granularity 'token'.
    segments = segment(entropy, mask, jnp.array(True), entropy_threshold=threshold)
    z = normalize(score, segments, Normalizer(*parameters), None)
    return {name: dense_reward(z, segments, mask, spread=name) for name in SPREADS}

  reward = run(
    padded([case['values'] for case in cases]),
    jnp.asarray(from_previous(np.array(padded([case['H'] for case in cases])))),
    padded([case['action_mask'] for case in cases], bool),
    jnp.array([case['thr'] for case in cases]),
    tuple(jnp.array(column) for column in zip(*map(fields, normalizers), strict=True)),
  )
  expected = padded([case['rewards'] for case in cases])
  for row, case in enumerate(cases):
    if sum(case['action_mask']) < 2:
      continue  # a stop token alone: no segment here, the last padding column there
    got = reward[GOLDEN_SPREADS[case['type']]][row]
    assert_allclose(got, expected[row], atol=1e-4, rtol=1e-4, err_msg=str(case))


def run_batch(batch, granularity):
  @jax.jit
  @jax.vmap
  def run(entropy, mask, finished, z):
    segments = segment(entropy, mask, finished, granularity=granularity)
    rewards = {name: dense_reward(z, segments, mask, spread=name) for name in SPREADS}
    short = {
      name: dense_reward(z, segments, mask, spread=name, length_norm=True) for name in SPREADS
    }
    return segments.segment_id, segments.end, segments.num_segments, rewards, short

  # Spoil z wherever it is no reward of a segment.
  content = np.where(batch.mask, batch.score, np.nan)
  names = ('entropy', 'mask', 'finished')
  arrays = [jnp.asarray(getattr(batch, name)) for name in names]
  return jax.device_get(run(*arrays, jnp.asarray(content)))  # numpy: slicing a jax array compiles


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_equals_oracle(granularity):
  batch = make_batch(seed=7)
  _, _, num_segments, rewards, short = run_batch(batch, granularity)
  for row, (entropy_after, mask, finished, score) in enumerate(
    batch.rows('entropy_after', 'mask', 'finished', 'score')
  ):
    ends = oracle.segment_ends(entropy_after, mask, finished, granularity, 2.0)
    z = [score[end] for end in ends]
    for name in SPREADS:
      expected = np.array(oracle.spread(z, ends, mask, name))
      assert_allclose(rewards[name][row], expected, atol=1e-6)
      assert_allclose(short[name][row], expected / max(sum(mask), 1), atol=1e-6)
    assert num_segments[row] == len(ends)


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_nothing_is_lost_and_nothing_leaks(granularity):
  batch = make_batch(seed=8)
  segment_id, end, num_segments, rewards, _ = run_batch(batch, granularity)
  total = np.where(end, batch.score, 0).sum(axis=1)
  # Over a segment an even split sums to z, so over a response to the sum of z.
  assert_allclose(rewards['even_split'].sum(axis=1), total, atol=1e-5)
  assert_allclose(rewards['end_only'].sum(axis=1), total, atol=1e-5)
  mean = total / np.maximum(num_segments, 1)
  assert_allclose(rewards['bandit'].sum(axis=1), mean, atol=1e-5)
  for row in range(len(batch.mask)):
    for index in range(num_segments[row]):
      inside = segment_id[row] == index
      z = batch.score[row][end[row] & inside]
      assert_allclose(np.sum(rewards['even_split'][row][inside]), z[0], atol=1e-5)
  for name, reward in rewards.items():
    assert_allclose(reward[~batch.mask], 0)
    if granularity != 'bandit' and name != 'bandit':
      last = batch.mask & ~np.pad(batch.mask, ((0, 0), (0, 1)))[:, 1:]
      stop_token = last & batch.finished[:, None]
      assert_allclose(reward[stop_token], 0)


@pytest.mark.parametrize('finished', [True, False])
def test_bandit_sits_on_the_last_real_token(finished):
  mask = jnp.array([False, True, True, True, False])
  segments = segment(jnp.zeros(5), mask, jnp.array(finished), granularity='bandit')
  reward = dense_reward(jnp.arange(5.0), segments, mask, spread='bandit')
  assert_allclose(reward, [0, 0, 0, 3, 0])


def test_segments_as_bandit():
  """The mean over several segments, on the stop token that lies in none of them."""
  mask = jnp.ones(4, bool)
  segments = segment(jnp.full(4, 9.0), mask, jnp.array(True))
  reward = dense_reward(jnp.array([1.0, 2.0, 6.0, 50.0]), segments, mask, spread='bandit')
  assert_allclose(reward, [0, 0, 0, 3])


@pytest.mark.parametrize('spread', SPREADS)
def test_no_segment_no_reward(spread):
  @jax.jit
  @jax.vmap
  def run(garbage, mask, kl):
    segments = segment(garbage, mask, jnp.array(True))
    dense = dense_reward(garbage, segments, mask, spread=spread, length_norm=True)
    return dense, shaped_reward(dense, kl, mask, kl_coef=0.5)

  mask = jnp.zeros((2, LENGTH), bool).at[1, 2].set(True)  # nothing; a stop token alone
  garbage = jnp.full(mask.shape, jnp.nan)
  dense, shaped = run(garbage, mask, jnp.where(mask, 1.0, jnp.nan))
  assert_allclose(dense, np.zeros(mask.shape))
  assert_allclose(shaped, np.where(mask, -0.5, 0))  # only the stop token's own penalty


def test_unknown_spread_lists_the_valid_ones():
  segments = segment(jnp.zeros(3), jnp.ones(3, bool), jnp.array(True))
  with pytest.raises(ValueError, match=r"'linear'.*even_split.*repeat.*end_only.*bandit"):
    dense_reward(jnp.zeros(3), segments, jnp.ones(3, bool), spread='linear')


def test_precision():
  mask = jnp.ones(3, bool)
  segments = segment(jnp.zeros(3), mask, jnp.array(False))
  half = jnp.ones(3, jnp.bfloat16)
  for spread in SPREADS:
    dense = dense_reward(half, segments, mask, spread=spread, length_norm=True)
    assert dense.dtype == jnp.float32
  assert shaped_reward(half, half, mask, kl_coef=0.1).dtype == jnp.float32
  with jax.enable_x64(True):
    double = jnp.ones(3, jnp.float64)
    assert dense_reward(double, segments, mask).dtype == jnp.float64


def test_wrong_arrays_raise():
  mask = jnp.ones(3, bool)
  segments = segment(jnp.zeros(3), mask, jnp.array(True))
  with pytest.raises(TypeCheckError):
    dense_reward(jnp.zeros(3, int), segments, mask)
  with pytest.raises(TypeCheckError):
    dense_reward(jnp.zeros(4), segments, mask)
  with pytest.raises(TypeCheckError):
    shaped_reward(jnp.zeros(3), jnp.zeros(2), mask, kl_coef=0.1)
  with pytest.raises(TypeCheckError):
    shaped_reward(jnp.zeros(3), jnp.zeros(3), jnp.ones(3), kl_coef=0.1)
