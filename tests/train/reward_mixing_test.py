"""Several sources of rewards: parts and their sum against slow loops, and invariants of the mix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.responses import LENGTH, make_batch
from numpy.testing import assert_allclose, assert_array_equal

from segjax.config.settings import RewardShaping
from segjax.rl import oracle
from segjax.train.experience import make_experience
from segjax.train.recipe import RewardSource
from segjax.train.reward_mixing import ListedRewards
from segjax.train.rollout_scoring import score
from segjax.train.scoring import ModelOutputs
from segjax.types import Normalizer, Rollout

BATCH = make_batch(seed=3, begin_anywhere=False)
ROWS = len(BATCH.mask)
SCORES = np.random.default_rng(8).normal(size=(4, ROWS, LENGTH)).astype(np.float32)
CUSTOM = np.where(BATCH.mask, SCORES[3], 0)
FIRST = (0.2, -0.1, 0.3, 0.8)  # w_mean, w_std, b_mean, b_std of the first model's normaliser
# name, score, granularity, threshold in nats, spread, weight, normaliser
LISTED = (
  ('tokens', SCORES[0], 'token', 2.0, 'even_split', -0.5, (0.0, 0.0, -0.4, 1.5)),
  ('whole', SCORES[1], 'bandit', 2.0, 'bandit', 2.0, (0.0, 0.0, 0.1, 0.7)),
  ('steps', SCORES[2], 'segment', 1.0, 'end_only', 0.25, (-0.1, 0.05, 0.2, 0.9)),
)
FLOOR = RewardShaping().std_floor_ratio


def listed_source(name, granularity='segment', threshold=2.0, spread='even_split', weight=1.0):
  segmenter = training.segmenter(granularity, threshold)
  return RewardSource(name, f'reward.{name}', models.CONFIG, segmenter, spread, weight)


def normalizer(values):
  return Normalizer(*map(jnp.float32, values))


def experience(sources=(), scores=None, normalizers=None, functions=None, **shaping):
  """Returns (experience, metrics) of the batch; `sources` are further reward models."""
  recipe = training.recipe(
    segmenter=training.segmenter('segment', 2.0),
    shaping=RewardShaping(**{'reward_clip': 0.0} | shaping),
    rewards=tuple(sources),
  )
  zeros = jnp.zeros((ROWS, LENGTH))
  outputs = ModelOutputs(
    old_logprob=zeros,
    ref_logprob=zeros,
    ref_entropy=jnp.asarray(BATCH.entropy),
    score=jnp.asarray(BATCH.score),
    value=zeros,
    prompt_score=zeros[:, 0],
    scores={name: jnp.asarray(x) for name, x in scores.items()} if scores else None,
  )
  rollout = Rollout(
    prompt_ids=jnp.zeros((ROWS, 1), jnp.int32),
    prompt_length=jnp.ones(ROWS, jnp.int32),
    response_ids=zeros.astype(jnp.int32),
    response_mask=jnp.asarray(BATCH.mask),
    finished=jnp.asarray(BATCH.finished),
    old_logprob=zeros,
  )
  given = None
  if functions is not None or sources:
    own = {name: normalizer(values) for name, values in (normalizers or {}).items()}
    given = ListedRewards(own, {k: jnp.asarray(x) for k, x in (functions or {}).items()})
  first = normalizer(FIRST)
  return jax.device_get(
    make_experience(rollout, outputs, first, jnp.float32(0), None, given, recipe=recipe)
  )


def mixed(functions=None, **shaping):
  """Returns the experience of the reward models in `LISTED`."""
  return experience(
    [listed_source(name, *values) for name, _, *values, _ in LISTED],
    {name: scores for name, scores, *_ in LISTED},
    {name: values for name, *_, values in LISTED},
    functions,
    **shaping,
  )


def ends_of(row, granularity, threshold):
  after, mask, finished = (
    x[row].tolist() for x in (BATCH.entropy_after, BATCH.mask, BATCH.finished)
  )
  return oracle.segment_ends(after, mask, finished, granularity, threshold)


def z_of(scores, row, ends, values):
  floor = max(FLOOR * values[3], 1e-6)
  return oracle.segment_z(scores[row].astype(float).tolist(), ends, values, floor)


def test_parts_of_each_density_equal_loops_and_add_up():
  found, metrics = mixed({'brief': 0.5 * CUSTOM}, reward_model_weight=0.7)
  sources = (('reward_model', BATCH.score, 'segment', 2.0, 'even_split', 0.7, FIRST), *LISTED)
  for name, scores, granularity, threshold, spread, weight, values in sources:
    expected = []
    for row in range(ROWS):
      ends = ends_of(row, granularity, threshold)
      z = z_of(scores, row, ends, values)
      dense = oracle.spread(z, ends, BATCH.mask[row].tolist(), spread)
      expected.append([weight * x for x in dense])
    assert_allclose(found.parts[name], expected, atol=1e-5, err_msg=name)
    mean = np.sum(expected, axis=1).mean()
    assert_allclose(metrics[f'reward/part/{name}'], mean, atol=1e-5)
  assert_allclose(found.parts['brief'], 0.5 * CUSTOM)
  assert found.parts.keys() == {'reward_model', 'tokens', 'whole', 'steps', 'brief'}
  assert_allclose(found.reward, sum(found.parts.values()), atol=1e-5)
  assert_allclose(metrics['reward/disagreement'], np.mean(deviations()), rtol=1e-5)


def deviations():
  """Returns the standard deviation of the four models' z about each segment of the first."""
  values = []
  for row in range(ROWS):
    ends = ends_of(row, 'segment', 2.0)
    z = [z_of(BATCH.score, row, ends, FIRST)]
    z += [z_of(scores, row, ends, own) for _, scores, *_, own in LISTED]
    for of_segment in zip(*z, strict=True):
      mean = sum(of_segment) / len(of_segment)
      values.append((sum((x - mean) ** 2 for x in of_segment) / len(of_segment)) ** 0.5)
  return values


@pytest.mark.parametrize('credit', ['sum', pytest.param('min', marks=pytest.mark.campaign)])
def test_a_mix_by_segment_equals_loops(credit):
  """The mean minus c standard deviations, credited and spread once as the first model's."""
  coef, temperature = 0.3, 0.5
  # Weights of a penalty are positive.
  sources = [listed_source(name, weight=abs(weight)) for name, *_, weight, _ in LISTED]
  found, metrics = experience(
    sources,
    {name: scores for name, scores, *_ in LISTED},
    {name: values for name, *_, values in LISTED},
    mix='segment',
    disagreement_coef=coef,
    credit=credit,
    credit_temperature=temperature,
  )
  weights, expected, spread_of = (
    [1.0, *(source.weight for source in sources)],
    [],
    iter(deviations()),
  )
  for row in range(ROWS):
    ends, mask = ends_of(row, 'segment', 2.0), BATCH.mask[row].tolist()
    models_z = [z_of(BATCH.score, row, ends, FIRST)]
    models_z += [z_of(scores, row, ends, own) for _, scores, *_, own in LISTED]
    z = []
    for of_segment in zip(*models_z, strict=True):
      mean = sum(w * x for w, x in zip(weights, of_segment, strict=True)) / sum(weights)
      z.append(sum(weights) * (mean - coef * next(spread_of)))
    if credit == 'min' and z:
      shares = [np.exp((min(z) - x) / temperature) for x in z]
      z = [x * share / sum(shares) for x, share in zip(z, shares, strict=True)]
    expected.append(oracle.spread(z, ends, mask, 'even_split'))
  assert_allclose(found.reward, expected, atol=2e-5)
  assert found.parts.keys() == {'reward_model', 'tokens', 'whole', 'steps', 'disagreement'}
  assert_allclose(sum(found.parts.values()), expected, atol=2e-5)
  assert_allclose(metrics['reward/disagreement'], np.mean(deviations()), rtol=1e-5)


@pytest.mark.parametrize(
  'shaping',
  [
    {},
    pytest.param({'mix': 'segment', 'disagreement_coef': 0.7}, marks=pytest.mark.campaign),
  ],
)
def test_two_equal_models_of_half_weight_are_one(shaping):
  one, _ = experience()
  two, metrics = experience(
    [listed_source('twin', weight=0.5)],
    {'twin': BATCH.score},
    {'twin': FIRST},
    reward_model_weight=0.5,
    **shaping,
  )
  assert_allclose(two.reward, one.reward, atol=1e-6)
  assert_array_equal(two.parts['twin'], two.parts['reward_model'])
  assert metrics['reward/disagreement'] == 0
  assert two.segments.end.any() and np.abs(one.reward).max() > 1


def test_nothing_is_added_where_nothing_is_listed():
  plain, metrics = experience()
  assert plain.parts is None
  assert not [name for name in metrics if 'part' in name or 'disagreement' in name]
  listed, more = experience(functions={})
  for name in ('reward', 'advantage'):
    assert_array_equal(getattr(listed, name), getattr(plain, name))
  assert more.keys() - metrics.keys() == {'reward/part/reward_model'}


@pytest.mark.campaign
def test_penalties_and_clip_come_after_the_mix():
  found, _ = mixed(
    reward_clip=0.5, missing_eos_penalty='per_token', missing_eos_penalty_value=-0.05
  )
  total = np.clip(sum(found.parts.values()), -0.5, 0.5)
  finished = BATCH.finished[:, None] & BATCH.mask
  assert_allclose(found.reward[finished], total[finished], atol=1e-6)
  assert_allclose(found.reward[~BATCH.finished[:, None] & BATCH.mask], -0.05)


@pytest.mark.campaign
def test_listed_models_are_scored_as_the_first_is():
  params = {name: training.network(name, models.mesh(1)) for name in training.SEEDS}
  other = models.place(models.params(models.CONFIG, 'scalar', 9), models.mesh(1))
  sampled = training.sample(params['policy'])
  one_batch = dataclasses.replace(training.PPO_SETTINGS, scoring_batch_size=0)
  both = training.recipe(ppo=one_batch, rewards=(listed_source('other'),))
  outputs = score(params | {'reward.other': other}, sampled.arrays, sampled.length, recipe=both)
  alone = training.recipe(ppo=one_batch)
  for name, reward in (('first', params['reward']), ('other', other)):
    own = score(params | {'reward': reward}, sampled.arrays, sampled.length, recipe=alone)
    found = outputs.score if name == 'first' else outputs.scores['other']
    assert_allclose(found, own.score, atol=3e-5)
    assert own.scores is None
