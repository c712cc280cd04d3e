import functools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.responses import LENGTH
from fixtures.strategies import corrupted, numbers, responses
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.normalizer import (
  KINDS,
  PUBLISHED,
  bin_moments,
  fit_constant,
  fit_quality,
  fit_regression,
  mean_std,
  normalize,
  relative_position,
)
from segjax.rl.segmentation import GRANULARITIES, segment
from segjax.types import Normalizer

# How the golden file names what PUBLISHED holds.
GOLDEN_NAMES = {
  ('phi3', 1.75): 'phi3_mini_instruct/segment@1.75',
  ('phi3', 0.0): 'phi3_mini_instruct/token',
  ('phi3', 2.0): 'phi3_mini_instruct/segment',
  ('llama3sft', 2.0): 'llama3_8b_sft/segment',
  ('llama3sft', 0.0): 'llama3_8b_sft/token',
  ('llama31', 2.0): 'llama31_8b_instruct/segment',
  ('llama31', 0.0): 'llama31_8b_instruct/token',
}

# Mean and Std at p = 1, 1/2, 1/4, 1/10, 1/100, 1/1024.
MEAN_STD = {
  'phi3_mini_instruct/segment@1.75': (
    [0.4705, -0.061005, -0.592511, -1.295122, -3.060745, -4.844552],
    [2.8339, 2.655830, 2.477761, 2.242366, 1.650832, 1.053205],
  ),
  'phi3_mini_instruct/token': (
    [1.2917, 0.624338, -0.043024, -0.925229, -3.142158, -5.381921],
    [3.5006, 3.237481, 2.974363, 2.626539, 1.752477, 0.869413],
  ),
  'phi3_mini_instruct/segment': (
    [0.6055, 0.105810, -0.393880, -1.054434, -2.714367, -4.391398],
    [2.6555, 2.493997, 2.332493, 2.118998, 1.582495, 1.040467],
  ),
  'llama3_8b_sft/segment': (
    [0.8572, 0.235655, -0.385890, -1.207528, -3.272256, -5.358251],
    [4.1667, 3.772992, 3.379285, 2.858832, 1.550963, 0.229624],
  ),
  'llama3_8b_sft/token': (
    [1.3212, 0.119283, -1.082634, -2.671483, -6.664165, -10.697972],
    [5.4513, 4.764668, 4.078037, 3.170359, 0.889418, -1.415016],
  ),
  'llama31_8b_instruct/segment': (
    [0.8798, 0.301369, -0.277063, -1.041707, -2.963215, -4.904513],
    [3.7358, 3.404476, 3.073151, 2.635164, 1.534529, 0.422557],
  ),
  'llama31_8b_instruct/token': (
    [0.6419, -0.485712, -1.613324, -3.103945, -6.849791, -10.634218],
    [4.9217, 4.488206, 4.054712, 3.481663, 2.041627, 0.586758],
  ),
}


# One shape for all fits: a loop of its own is compiled for each.
SIZE = 20_000
OPTIONS = ('weighting', 'min_count', 'first_bin')
fit_by_regression = jax.jit(fit_regression, static_argnames=OPTIONS)
quality = jax.jit(fit_quality, static_argnames=OPTIONS)
moments = jax.jit(bin_moments)


def fields(normalizer):
  return normalizer.w_mean, normalizer.w_std, normalizer.b_mean, normalizer.b_std


@functools.partial(jax.jit, static_argnames='std_floor_ratio')
def z_by_token(score, num_tokens, normalizer, std_floor_ratio=0.01):
  mask = jnp.arange(len(score)) < num_tokens
  segments = segment(score, mask, jnp.array(False), granularity='token')
  return normalize(score, segments, normalizer, std_floor_ratio)


def z_of(score, normalizer, std_floor_ratio=0.01):
  """z of a response each of whose tokens is a segment."""
  longer = jnp.asarray(np.pad(np.array(score, np.float32), (0, 500 - len(score))))
  return z_by_token(longer, len(score), normalizer, std_floor_ratio)[: len(score)]


@pytest.mark.parametrize('name', MEAN_STD)
def test_published_mean_std(name):
  position = jnp.array([1, 1 / 2, 1 / 4, 1 / 10, 1 / 100, 1 / 1024])
  # Printed to six decimals, and computed in float32.
  assert_allclose(mean_std(position, PUBLISHED[name]), MEAN_STD[name], atol=3e-6)


def test_golden_mean_std(shared_files):
  cases = json.loads((shared_files / 'spec' / 'golden.json').read_text())['norm']
  for case in cases:
    normalizer = PUBLISHED[GOLDEN_NAMES[case['model'], case['thr']]]
    mean, std = mean_std(jnp.array(case['p']), normalizer)
    assert_allclose([mean, std], [case['mean'], case['std']], atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'raw', 'index', 'count', 'z'),
  [
    ('phi3_mini_instruct/segment@1.75', 1.0, 1, 4, 0.642722),
    ('phi3_mini_instruct/segment@1.75', 1.0, 4, 4, 0.186845),
    ('phi3_mini_instruct/segment@1.75', -2.0, 2, 4, -0.730090),
    ('llama31_8b_instruct/segment', 0.5, 3, 3, -0.101665),
    ('llama3_8b_sft/token', 1.0, 1, 500, -14.83),
  ],
)
def test_worked_z(name, raw, index, count, z):
  got = z_of([raw] * count, PUBLISHED[name], None)
  assert_allclose(got[index - 1], z, rtol=4e-4 if count == 500 else 1e-5)  # as printed


def test_floor_keeps_std_positive():
  """Llama-3-SFT by tokens: without a floor Std changes sign between 245 and 246 tokens."""
  normalizer = PUBLISHED['llama3_8b_sft/token']
  for count, sign in ((245, 1), (246, -1)):
    assert np.sign(z_of([1.0] * count, normalizer, None)[0]) == sign
    _, std = mean_std(jnp.array(1 / count), normalizer, 0.054513)
    assert_allclose(std, 0.054513)
    # Mean(1/245) = 1.3212 - 1.7340 ln 245 = -8.218; (1 + 8.218) / .0545 = 169.
    assert_allclose(z_of([1.0] * count, normalizer)[0], 169, rtol=0.01)


def test_floor_changes_nothing_above_it():
  normalizer = PUBLISHED['phi3_mini_instruct/segment']
  assert_allclose(z_of(range(8), normalizer), z_of(range(8), normalizer, None))


@jax.jit
def normalize_every_way(entropy, mask, finished, score, normalizer):
  normalized = {}
  for granularity in GRANULARITIES:
    segments = segment(entropy, mask, finished, granularity=granularity)
    z = [normalize(score, segments, normalizer, ratio) for ratio in (None, 0.01)]
    normalized[granularity] = relative_position(segments), z
  return normalized


@given(response=responses(), score=numbers(), name=st.sampled_from(sorted(PUBLISHED)))
def test_normalize_equals_oracle(response, score, name):
  entropy_after, entropy, mask, finished = response
  normalizer = fields(PUBLISHED[name])
  arguments = (entropy, mask, finished, corrupted(score, mask), PUBLISHED[name])
  normalized = jax.device_get(normalize_every_way(*arguments))
  for granularity, (position, every_z) in normalized.items():
    row = entropy_after.tolist(), mask.tolist(), bool(finished)
    ends = oracle.segment_ends(*row, granularity, 2.0)
    for z, floor in zip(every_z, (None, 0.01 * normalizer[3]), strict=True):
      expected = oracle.segment_z(score.tolist(), ends, normalizer, floor)
      assert_allclose(z[ends], expected, rtol=1e-5, atol=1e-5)
      inside = np.zeros(LENGTH, bool)
      for index, (first, last) in enumerate(oracle.spans(ends, oracle.run_of(mask.tolist())[0])):
        inside[first : last + 1] = True
        assert_allclose(position[first : last + 1], (index + 1) / len(ends), rtol=1e-6)
      assert_allclose(position[~inside], 1)
      assert_allclose(z[~inside], 0)


def test_position_is_the_quotient_exactly():
  """As one float32 division, so that the last is 1 and ties of the bins are those of the paper."""
  count = np.arange(1, 129)
  mask = np.arange(128) < count[:, None]

  @jax.jit
  @jax.vmap
  def run(mask):
    return relative_position(segment(jnp.zeros(128), mask, jnp.array(False), granularity='token'))

  rank = np.arange(1, 129, dtype=np.float32)
  expected = np.where(mask, rank / count[:, None].astype(np.float32), 1)
  assert np.array_equal(run(mask), expected)


def test_as_many_segments_as_tokens():
  """2,048 of them and a stop token: every p is exact, the smallest included."""

  @jax.jit
  def run(score):
    segments = segment(score, jnp.ones(2049, bool), jnp.array(True), granularity='token')
    z = normalize(score, segments, PUBLISHED['llama3_8b_sft/token'])
    return segments.num_segments, relative_position(segments), z

  count, position, z = jax.device_get(run(jnp.zeros(2049)))
  assert count == 2048
  assert position.tolist() == [*(np.arange(1, 2049) / 2048), 1]
  assert np.all(np.isfinite(z)) and z[-1] == 0


def test_constants_are_special_cases():
  assert KINDS == ('none', 'global', 'last', 'scalar', 'regression')
  assert_allclose(z_of([1, 2, 4], Normalizer()), [1, 2, 4])
  assert_allclose(z_of([1, 2, 4], Normalizer(b_mean=1.0, b_std=2.0)), [0, 0.5, 1.5])


def test_published_bandit():
  assert_allclose(z_of([-3], PUBLISHED['phi3_mini_instruct/bandit']), [-1.1503623], rtol=1e-6)


def test_every_published_model_has_every_granularity():
  models = ('llama3_8b_sft', 'llama31_8b_instruct', 'phi3_mini_instruct')
  expected = {f'{model}/{granularity}' for model in models for granularity in GRANULARITIES}
  assert set(PUBLISHED) == expected | {'phi3_mini_instruct/segment@1.75'}


def test_worked_bins():
  worked = {1 / 3: 333, 2 / 7: 286, 1 / 16: 62, 1 / 1999: 1, 1 / 2001: 0, 1 / 2048: 0}
  count, _, _ = moments(*filled(list(worked), np.zeros(len(worked))))
  assert count.tolist() == np.bincount(list(worked.values()), minlength=1001).tolist()


# 0.05 to 0.95 are ties that a binary fraction hits a little high, a little low or, at odd
# sixteenths, exactly.
@pytest.mark.parametrize(
  'counts', [range(1, 65), [80, 160, 400, 1000, 1999], [2000, 2001, 2048]], ids=str
)
def test_bins_are_those_of_python_format(counts):
  position = [rank / count for count in counts for rank in range(1, count + 1)]
  expected = np.bincount([int(f'{p:.3f}'.replace('.', '')) for p in position], minlength=1001)
  for dtype in (jnp.float32, jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
      arrays = filled(position, np.zeros(len(position)), dtype)
      assert np.array_equal(moments(*arrays)[0], expected)


FIT_B = [
  [0.1, 0.6, 1.2, 1.5],
  [-0.9, 0.3, 0.8],
  [-1.2, -0.1, 0.5, 0.9, 1.4],
  [0.7],
  [-0.4, 1.1],
  [-2, -1, -0.2, 0.4, 0.6, 0.9, 1, 1.3],
]
# bin: (count, mean, std)
FIT_B_BINS = {
  125: (1, -2, 0),
  200: (1, -1.2, 0),
  250: (2, -0.45, 0.55),
  333: (1, -0.9, 0),
  375: (1, -0.2, 0),
  400: (1, -0.1, 0),
  500: (3, 0.2, 0.432049),
  600: (1, 0.5, 0),
  625: (1, 0.6, 0),
  667: (1, 0.3, 0),
  750: (2, 1.05, 0.15),
  800: (1, 0.9, 0),
  875: (1, 1.0, 0),
  1000: (6, 1.133333, 0.298142),
}


def flattened(responses):
  """(position, score, mask) of the segments, with garbage behind them."""
  position = [(i + 1) / len(scores) for scores in responses for i in range(len(scores))]
  score = [float(x) for scores in responses for x in scores]
  return filled(position, score)


def filled(position, score, dtype=jnp.float32):
  behind = np.full(SIZE - len(score), np.nan)
  arrays = [jnp.asarray(np.concatenate([a, behind]), dtype) for a in (position, score)]
  return *arrays, jnp.arange(SIZE) < len(score)


def test_worked_bins_and_fit():
  position, score, mask = flattened(FIT_B)
  expected = np.zeros((3, 1001))
  for index, moment in FIT_B_BINS.items():
    expected[:, index] = moment
  assert_allclose(moments(position, score, mask), expected, atol=1e-6)
  normalizer = fit_by_regression(position, score, mask)
  assert_allclose([normalizer.w_mean, normalizer.b_mean], [1.523962, 1.247126], atol=1e-5)


def test_bin_moments_equal_oracle():
  rng = random.Random(0)
  position, score = [], []
  for _ in range(40):
    count = rng.randint(1, 12)
    position += [(rank + 1) / count for rank in range(count)]
    score += [rng.gauss(100, 1) for _ in range(count)]  # far from 0: cancellation would show
  count, mean, std = moments(*filled(position, score))
  expected = oracle.bin_moments(position, score)
  assert count.sum() == len(score)
  for key, moment in expected.items():
    index = round(1000 * float(key))
    assert_allclose([count[index], mean[index], std[index]], moment, rtol=1e-6, atol=2e-5)


def test_moments_of_a_large_bin_are_exact():
  """Added up one by one in float32, equal scores round the same way every time."""
  score = np.full(SIZE, 100.1, np.float32)
  count, mean, std = moments(*filled(np.ones(SIZE), score))
  assert count[1000] == SIZE
  assert_allclose(mean[1000], score[0], rtol=1e-7)
  assert std[1000] < 1e-4


@pytest.mark.parametrize(
  ('options', 'line'),
  [
    ({}, [1.523962, 1.247126]),
    ({'weighting': 'count'}, [1.412748, 1.171897]),
    ({'first_bin': 0}, [0.241985, 0.405901]),
  ],
  ids=['bins alike', 'by count', 'with bin 0'],
)
def test_worked_options(options, line):
  """As scikit-learn fits the means of FIT_B and, in bin 0, one of -5."""
  position, score, mask = flattened(FIT_B)
  last = int(mask.sum())
  arrays = position.at[last].set(1 / 2001), score.at[last].set(-5.0), mask.at[last].set(True)
  normalizer = fit_by_regression(*arrays, **options)
  assert_allclose([normalizer.w_mean, normalizer.b_mean], line, atol=1e-5)


@pytest.mark.parametrize(
  ('weighting', 'min_count', 'first_bin'),
  [('uniform', 1, 1), ('uniform', 3, 0), ('count', 1, 0), ('count', 3, 1)],
)
def test_options_equal_scikit_learn(weighting, min_count, first_bin):
  """Bins by the oracle, the published code's fit of them, and the usual measures of a fit."""
  linear_model = pytest.importorskip('sklearn.linear_model')
  metrics = pytest.importorskip('sklearn.metrics')
  rng = random.Random(1)
  counts = [rng.randint(1, 12) for _ in range(60)]
  # The first three of 2,048 segments: p = .00049, .00098, .00146 are the bins 0, 1, 1.
  position = [(rank + 1) / count for count in counts for rank in range(count)]
  position += 4 * [rank / 2048 for rank in (1, 2, 3)]
  score = [rng.gauss(math.log(p) / 2 + 1, math.log(p) / 10 + 2) for p in position]
  options = {'weighting': weighting, 'min_count': min_count, 'first_bin': first_bin}
  arrays = filled(position, score)
  normalizer = fit_by_regression(*arrays, **options)
  got = quality(*arrays, normalizer, **options)

  bins = {float(key): moment for key, moment in oracle.bin_moments(position, score).items()}
  assert bins[0][0] == 4 and bins[0.001][0] == 8
  used = [p for p in bins if bins[p][0] >= min_count and round(1000 * p) >= first_bin]
  assert got.num_bins == len(used)
  x = np.log(np.array(used) + 1e-10)
  count, *moments_ = np.array([bins[p] for p in used]).T
  weight = count if weighting == 'count' else np.ones(len(x))
  lines = (normalizer.w_mean, normalizer.b_mean), (normalizer.w_std, normalizer.b_std)
  for y, line, r2, rms in zip(moments_, lines, got[:2], got[2:4], strict=True):
    fit = linear_model.HuberRegressor(max_iter=20_000, tol=1e-10)
    fit.fit(x[:, None], y, sample_weight=weight)
    assert_allclose(line, [fit.coef_[0], fit.intercept_], atol=1e-4)
    fitted = fit.predict(x[:, None])
    assert_allclose(r2, metrics.r2_score(y, fitted, sample_weight=weight), atol=1e-3)
    assert_allclose(rms, np.sqrt(np.average((y - fitted) ** 2, weights=weight)), atol=1e-4)


def test_unknown_weighting_lists_the_valid_ones():
  for call in (fit_regression, functools.partial(fit_quality, normalizer=Normalizer())):
    with pytest.raises(ValueError, match=r"'length'.*uniform.*count"):
      call(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), weighting='length')


def test_bin_zero_does_not_count():
  position, score, mask = flattened(FIT_B)
  num_scores = int(mask.sum())
  clean = fit_by_regression(position, score, mask)
  # p = 1/2048 prints as 0.000.
  position, score = position.at[num_scores].set(1 / 2048), score.at[num_scores].set(50.0)
  mask = mask.at[num_scores].set(True)
  count, _, _ = moments(position, score, mask)
  assert count[0] == 1 and count.sum() == num_scores + 1
  assert_allclose(fields(fit_by_regression(position, score, mask)), fields(clean))


def test_regression_recovers_a_known_normalizer():
  truth = Normalizer(0.8, 0.3, 0.5, 2.5)
  rng = np.random.default_rng(0)
  position = np.tile(np.arange(1, 21) / 20, 1000)
  mean, std = mean_std(jnp.asarray(position, jnp.float32), truth)
  score = np.asarray(mean) + np.asarray(std) * rng.normal(size=len(position))
  segments = filled(position, score)
  normalizer = fit_by_regression(*segments)
  assert_allclose(fields(normalizer), fields(truth), atol=0.12)  # 1000 samples a bin
  got = quality(*segments, normalizer)
  assert got.r2_mean > 0.98 and got.r2_std > 0.95 and got.num_bins == 20


def test_fit_constant():
  normalizer = fit_constant(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]))
  assert_allclose(fields(normalizer), [0, 0, 2, 1])


@pytest.mark.parametrize('kind', ['constant', 'regression'])
@pytest.mark.parametrize('num_scores', [0, 1])
def test_fits_of_next_to_nothing_are_finite(kind, num_scores):
  position, score, mask = filled([0.5] * num_scores, [3.0] * num_scores)
  if kind == 'constant':
    normalizer = fit_constant(score, mask)
  else:
    normalizer = fit_by_regression(position, score, mask)
  assert_allclose(fields(normalizer), [0, 0, 3 * num_scores, 0], atol=1e-5)
  assert np.all(np.isfinite(z_of([3, 3], normalizer)))
  assert all(map(math.isfinite, quality(position, score, mask, normalizer)))


def test_garbage_outside_segments_stays_outside():
  segments = segment(jnp.zeros(4), jnp.array([True, True, False, False]), jnp.array(True))
  z = normalize(jnp.array([2.0, jnp.nan, jnp.nan, jnp.inf]), segments, Normalizer())
  assert_allclose(z, [2, 0, 0, 0])


def test_precision():
  segments = segment(jnp.zeros(2), jnp.ones(2, bool), jnp.array(False))
  assert normalize(jnp.zeros(2, jnp.bfloat16), segments, Normalizer()).dtype == jnp.float32
  with jax.enable_x64(True):
    z = normalize(jnp.zeros(2, jnp.float64), segments, Normalizer())
    assert z.dtype == jnp.float64


def test_wrong_arrays_raise():
  segments = segment(jnp.zeros(3), jnp.ones(3, bool), jnp.array(False))
  for score in (jnp.zeros(3, int), jnp.zeros((1, 3))):
    with pytest.raises(TypeCheckError):
      normalize(score, segments, Normalizer())
  with pytest.raises(TypeError, match='incompatible shapes'):
    normalize(jnp.zeros(4), segments, Normalizer())
  with pytest.raises(TypeCheckError):
    bin_moments(jnp.zeros(3), jnp.zeros(4), jnp.ones(3, bool))
