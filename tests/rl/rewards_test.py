import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.platforms import PATHS, jit_by_path
from fixtures.responses import LENGTH, from_previous, padded
from fixtures.strategies import corrupted, numbers, responses
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle, oracle_spreads
from segjax.rl.aggregation import AGGREGATIONS
from segjax.rl.normalizer import PUBLISHED, normalize
from segjax.rl.rewards import (
  BASELINES,
  END_PENALTIES,
  LENGTH_PENALTIES,
  end_penalty,
  length_penalty,
  red,
  shaped_reward,
)
from segjax.rl.segmentation import GRANULARITIES, segment
from segjax.rl.spreads import SPREADS, dense_reward
from segjax.types import Normalizer

from .normalizer_test import GOLDEN_NAMES, fields

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
def worked(threshold, normalizer, granularity='segment', **options):
  entropy = jnp.asarray(from_previous(ENTROPY_AFTER))
  segments = segment(
    entropy, MASK, jnp.array(True), granularity=granularity, entropy_threshold=threshold
  )
  z = normalize(jnp.array(VALUES), segments, normalizer, None)
  return dense_reward(z, segments, MASK, **options)


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
  assert_allclose(shaped_reward(dense, kl, mask, kl_coef=0, clip=None)[:4], dense[:4])


@pytest.mark.parametrize('path', PATHS)
def test_golden_file(shared_files, path):
  cases = json.loads((shared_files / 'spec' / 'golden.json').read_text())['dense']
  normalizers = [PUBLISHED[GOLDEN_NAMES[case['model'], case['thr']]] for case in cases]

  @jax.vmap
  def run(score, entropy, mask, threshold, parameters):
    # Their token runs merge tokens of entropy exactly 0: threshold 0, not granularity 'token'.
    segments = segment(entropy, mask, jnp.array(True), entropy_threshold=threshold)
    z = normalize(score, segments, Normalizer(*parameters), None)
    return {name: dense_reward(z, segments, mask, spread=name) for name in GOLDEN_SPREADS.values()}

  reward = jit_by_path(run)[path](
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


def run_response(entropy, mask, finished, z, granularity):
  segments = segment(entropy, mask, finished, granularity=granularity)
  spread_out = functools.partial(dense_reward, z, segments, mask, entropy=entropy)
  rewards = {name: spread_out(spread=name) for name in SPREADS}
  short = {name: spread_out(spread=name, length_norm=True) for name in SPREADS}
  bandits = {
    name: dense_reward(z, segments, mask, spread='bandit', aggregation=name, temperature=0.5)
    for name in AGGREGATIONS
  }
  return segments.segment_id, rewards, short, bandits


WAYS = [*((granularity, 'loop') for granularity in GRANULARITIES), ('segment', 'parallel')]
RUN_RESPONSE = jit_by_path(run_response, static_argnums=4)


@pytest.mark.parametrize(('granularity', 'path'), WAYS)
@given(response=responses(), score=numbers())
def test_spreads_equal_oracle(path, granularity, response, score):
  entropy_after, entropy, mask, finished = response
  ends = oracle.segment_ends(
    entropy_after.tolist(), mask.tolist(), bool(finished), granularity, 2.0
  )
  z = np.where(np.isin(np.arange(LENGTH), ends), score, np.nan)
  got = RUN_RESPONSE[path](entropy, mask, finished, z.astype(np.float32), granularity)
  segment_id, rewards, short, bandits = jax.device_get(got)
  for name, reward in rewards.items():
    lists = score[ends].tolist(), ends, mask.tolist()
    if name == 'entropy_weighted':
      expected = np.array(oracle_spreads.entropy_weighted(*lists, entropy.tolist()))
    else:
      expected = np.array(oracle.spread(*lists, name))
    assert_allclose(reward, expected, atol=1e-5)
    assert_allclose(short[name], expected / max(mask.sum(), 1), atol=1e-5)
    assert not reward[~mask].any()  # exactly 0
  for name, reward in bandits.items():
    expected = oracle.spread(score[ends].tolist(), ends, mask.tolist(), 'bandit', name, 0.5)
    assert_allclose(reward, expected, atol=1e-5)
  for index, end in enumerate(ends):
    for name in ('even_split', 'end_only', 'entropy_weighted'):
      assert_allclose(np.sum(rewards[name][segment_id == index]), score[end], atol=1e-5)
  # Outside the segments there is nothing, not even on the stop token.
  for name in ('even_split', 'repeat', 'end_only', 'entropy_weighted'):
    assert not rewards[name][segment_id < 0].any()


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


def test_segments_as_bandit_by_other_aggregates():
  mask = jnp.ones(4, bool)
  segments = segment(jnp.full(4, 9.0), mask, jnp.array(True))

  def last(**options):
    z = jnp.array([1.0, 2.0, 6.0, jnp.nan])
    reward = dense_reward(z, segments, mask, spread='bandit', **options)
    assert_allclose(reward[:3], 0)
    return reward[3]

  assert last(aggregation='sum') == 9
  assert last(aggregation='max') == 6
  # At a temperature of 1 / ln 2 the weights are 2^z, as 1, 2, 32: (1 + 4 + 192) / 35.
  temperature = 1 / np.log(2)
  assert_allclose(last(aggregation='softmax', temperature=temperature), 197 / 35, rtol=1e-6)
  # To the other spreads it is all the same.
  z = jnp.arange(4.0)
  assert_allclose(dense_reward(z, segments, mask, aggregation='max'), [0, 1, 2, 0])


def test_red_worked():
  """Segments (1, 2), (3) and (4, 5), the stop token at 5; a prompt of one token."""
  mask = jnp.array([False, True, True, True, True, True, False])
  entropy = jnp.array([0, 0, 0, 9, 9, 0, 0.0])
  score = jnp.array([jnp.nan, jnp.nan, 1.5, 1.0, jnp.nan, 4.0, jnp.nan])
  segments = segment(entropy, mask, jnp.array(True), stop_inside=True)
  got = red(score, jnp.array(0.25), segments, mask)
  assert_allclose(got, [0, 0, 1.25, -0.5, 0, 3, 0])
  got = red(score, jnp.array(jnp.nan), segments, mask, baseline='zero')
  assert_allclose(got, [0, 0, 1.5, -0.5, 0, 3, 0])


def run_red(entropy, mask, finished, score, prompt_score, granularity):
  segments = segment(entropy, mask, finished, granularity=granularity, stop_inside=True)
  return segments.end, {
    baseline: red(score, prompt_score, segments, mask, baseline=baseline) for baseline in BASELINES
  }


RUN_RED = jit_by_path(run_red, static_argnums=5)


@pytest.mark.parametrize(('granularity', 'path'), WAYS)
@given(response=responses(), score=numbers(), prompt_score=numbers(()))
def test_red_equals_oracle(path, granularity, response, score, prompt_score):
  _, entropy, mask, finished = response
  got = RUN_RED[path](entropy, mask, finished, corrupted(score, mask), prompt_score, granularity)
  end, rewards = jax.device_get(got)
  ends = np.flatnonzero(end).tolist()
  for baseline, reward in rewards.items():
    expected = oracle.red(score.tolist(), prompt_score.item(), ends, baseline)
    assert_allclose(reward, expected, atol=1e-5)
    total = score[np.flatnonzero(mask)[-1]] if ends else 0  # the last end is the last token
    if ends and baseline == 'prompt':
      total -= prompt_score
    assert_allclose(reward.sum(), total, atol=1e-5)


def test_penalties_worked():
  dense, mask = jnp.array([0, 1, 2, 3, 0.0]), jnp.array([False, True, True, True, False])
  unfinished = functools.partial(end_penalty, dense, mask, jnp.array(False), value=-0.5)
  assert_allclose(unfinished(kind='off'), dense)
  assert_allclose(unfinished(kind='per_token'), [0, -0.5, -0.5, -0.5, 0])
  assert_allclose(unfinished(kind='at_eos'), [0, 1, 2, 2.5, 0])
  penalty = functools.partial(length_penalty, dense, mask, value=-0.5)
  assert_allclose(penalty(kind='threshold', threshold=3), dense)  # exactly as many are allowed
  assert_allclose(penalty(kind='threshold', threshold=2), [0, -0.5, -0.5, -0.5, 0])
  assert_allclose(penalty(kind='linear', threshold=2), [0, 1, 2, 2.5, 0])
  assert_allclose(penalty(kind='off', threshold=2), dense)


@jax.jit
def run_penalties(dense, mask, finished, threshold):
  ended = {
    kind: end_penalty(dense, mask, finished, kind=kind, value=-0.05) for kind in END_PENALTIES
  }
  shortened = {
    kind: length_penalty(dense, mask, kind=kind, value=-0.05, threshold=threshold)
    for kind in LENGTH_PENALTIES
  }
  return ended, shortened


@given(response=responses(), dense=numbers(), threshold=st.integers(0, LENGTH))
def test_penalties_equal_oracle(response, dense, threshold):
  _, _, mask, finished = response
  got = run_penalties(corrupted(dense, mask), mask, finished, threshold)
  lists = np.where(mask, dense, 0).tolist(), mask.tolist()
  ended, shortened = jax.device_get(got)
  for kind, reward in ended.items():
    expected = oracle.end_penalty(*lists, bool(finished), kind, -0.05)
    assert_allclose(reward, expected, atol=1e-6)
    if finished:
      assert_allclose(reward, lists[0])
  for kind, reward in shortened.items():
    expected = oracle.length_penalty(*lists, kind, -0.05, threshold)
    assert_allclose(reward, expected, atol=1e-6)


@pytest.mark.parametrize('spread', SPREADS)
def test_no_segment_no_reward(spread):
  @jax.jit
  @jax.vmap
  def run(garbage, mask, kl):
    segments = segment(garbage, mask, jnp.array(True))
    dense = dense_reward(garbage, segments, mask, spread=spread, length_norm=True, entropy=garbage)
    dense = end_penalty(dense, mask, jnp.array(True), kind='per_token', value=-1.0)
    dense = length_penalty(dense, mask, kind='linear', value=-1.0, threshold=1)
    dense += red(garbage, jnp.array(jnp.nan), segments, mask)
    return dense, shaped_reward(dense, kl, mask, kl_coef=0.5)

  mask = jnp.zeros((2, LENGTH), bool).at[1, 2].set(True)  # nothing; a stop token alone
  garbage = jnp.full(mask.shape, jnp.nan)
  dense, shaped = run(garbage, mask, jnp.where(mask, 1.0, jnp.nan))
  assert_allclose(dense, np.zeros(mask.shape))
  assert_allclose(shaped, np.where(mask, -0.5, 0))  # only the stop token's own penalty


def test_unknown_names_list_the_valid_ones():
  zeros, mask = jnp.zeros(3), jnp.ones(3, bool)
  segments = segment(zeros, mask, jnp.array(True))
  with pytest.raises(ValueError, match=r"'linear'.*even_split.*repeat.*end_only.*bandit"):
    dense_reward(zeros, segments, mask, spread='linear')
  with pytest.raises(ValueError, match=r"'none'.*prompt.*zero"):
    red(zeros, zeros[0], segments, mask, baseline='none')
  with pytest.raises(ValueError, match=r"'on'.*off.*per_token.*at_eos"):
    end_penalty(zeros, mask, jnp.array(True), kind='on', value=0.0)
  with pytest.raises(ValueError, match=r"'on'.*off.*threshold.*linear"):
    length_penalty(zeros, mask, kind='on', value=0.0, threshold=1)


def test_precision():
  mask = jnp.ones(3, bool)
  segments = segment(jnp.zeros(3), mask, jnp.array(False))
  half = jnp.ones(3, jnp.bfloat16)
  for spread in SPREADS:
    dense = dense_reward(half, segments, mask, spread=spread, length_norm=True, entropy=half)
    assert dense.dtype == jnp.float32
  assert shaped_reward(half, half, mask, kl_coef=0.1).dtype == jnp.float32
  assert red(half, half[0], segments, mask).dtype == jnp.float32
  for kind in ('per_token', 'at_eos'):
    penalised = end_penalty(half, mask, jnp.array(False), kind=kind, value=-1.0)
    assert penalised.dtype == jnp.float32
  with jax.enable_x64(True):
    double = jnp.ones(3, jnp.float64)
    assert dense_reward(double, segments, mask).dtype == jnp.float64
    assert red(double, double[0], segments, mask).dtype == jnp.float64
    penalised = length_penalty(double, mask, kind='linear', value=-1.0, threshold=1)
    assert penalised.dtype == jnp.float64


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
