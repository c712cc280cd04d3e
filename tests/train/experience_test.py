"""Scores and experience of a rollout, against full forward passes and the slow loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.compiles import compiled
from fixtures.responses import LENGTH, make_batch
from numpy.testing import assert_allclose

from segjax.config.settings import PPO, RewardShaping
from segjax.model import host_memory
from segjax.rl import oracle, oracle_advantages
from segjax.train import rollout_scoring
from segjax.train.experience import make_experience
from segjax.train.rollout_metrics import within_bounds, z_by_position
from segjax.train.rollout_rows import concat_prompt_response, gather_response, take_rows
from segjax.train.rollout_scoring import score
from segjax.train.scoring import ModelOutputs
from segjax.types import Normalizer, Rollout, Segments

RECIPE = training.recipe(reward_lm=models.CONFIG)
ONE_BATCH = dataclasses.replace(
  RECIPE, ppo=dataclasses.replace(training.PPO_SETTINGS, scoring_batch_size=0)
)
NORMALIZER = (0.2, -0.1, 0.3, 0.8)  # w_mean, w_std, b_mean, b_std


@pytest.fixture(scope='module')
def params():
  mesh = models.mesh(1)
  networks = {name: training.network(name, mesh) for name in training.SEEDS}
  return networks | {'reward_lm': models.place(models.params(models.CONFIG, seed=4), mesh)}


@pytest.fixture(scope='module')
def sampled(params):
  return training.sample(params['policy'])


@pytest.fixture(scope='module')
def rollout(sampled):
  return sampled.arrays


@pytest.fixture(scope='module')
def length(sampled):
  return sampled.length


def test_join_and_window_equal_a_loop(rollout):
  ids = np.asarray(jax.jit(concat_prompt_response)(rollout))
  host = training.copied(rollout)
  assert ids.shape == (models.BATCH, training.PROMPT + training.RESPONSE)
  for row, length in enumerate(training.LENGTHS):
    expected = [*host.prompt_ids[row, :length], *host.response_ids[row]]
    assert ids[row, : len(expected)].tolist() == expected
  x = np.random.default_rng(0).normal(size=ids.shape).astype(np.float32)
  window = gather_response(jnp.asarray(x), rollout.prompt_length, training.RESPONSE)
  for row, length in enumerate(training.LENGTHS):
    np.testing.assert_array_equal(window[row], x[row, length : length + training.RESPONSE])


def test_outputs_equal_windows_of_full_forwards(params, rollout, length):
  outputs = score(params, rollout, length, recipe=RECIPE)
  ids = jax.jit(concat_prompt_response)(rollout)
  logprob, entropy = models.token_logprobs(params['reference'], ids, models.CONFIG)
  expected = {
    'ref_logprob': logprob,
    'ref_entropy': entropy,
    'lm_logprob': models.token_logprobs(params['reward_lm'], ids, models.CONFIG)[0],
    'score': models.scores(params['reward'], ids, models.CONFIG),
    'value': models.values(params['critic'], ids, models.CONFIG),
  }
  for name, full in expected.items():
    for row, length in enumerate(training.LENGTHS):
      got = getattr(outputs, name)[row]
      assert_allclose(got, full[row, length : length + training.RESPONSE], atol=3e-5, err_msg=name)
  np.testing.assert_array_equal(outputs.old_logprob, rollout.old_logprob)


def test_chunks_equal_one_batch(params, rollout, length, caplog):
  with compiled(caplog) as names:
    chunks = score(params, rollout, length, recipe=RECIPE)
  assert names.count('score_chunk') <= 1
  expected = score(params, rollout, length, recipe=ONE_BATCH)
  # float32, matrix products with another number of rows.
  close = functools.partial(assert_allclose, atol=3e-5)
  jax.tree.map(close, chunks, expected)


def test_frozen_models_in_host_memory(params, rollout, length):
  expected = score(params, rollout, length, recipe=RECIPE)
  on_host = {
    name: host_memory.to_host(params[name]) for name in ('reference', 'reward', 'reward_lm')
  }
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(on_host)}
  assert kinds == {'pinned_host'}
  moved = score(params | on_host, rollout, length, recipe=RECIPE)
  jax.tree.map(np.testing.assert_array_equal, moved, expected)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(on_host)} == kinds  # still on the host


def test_no_values_without_a_critic(params, rollout, length):
  frozen = {name: params[name] for name in ('reference', 'reward')}
  ppo = dataclasses.replace(training.PPO_SETTINGS, estimator='reinforce_plus_plus')
  outputs = score(frozen, rollout, length, recipe=training.recipe(ppo=ppo))
  assert outputs.value is None


def test_take_rows(rollout):
  rows = np.array([5, 0, 5, 3])
  selected, expected = training.copied(take_rows(rollout, rows)), training.copied(rollout)
  np.testing.assert_array_equal(selected.response_ids, expected.response_ids[rows])
  np.testing.assert_array_equal(selected.prompt_length, expected.prompt_length[rows])


def by_loops(batch, outputs, recipe):
  """Returns segment ends, dense rewards, rewards and advantages by loops over lists."""
  ppo, segmentation = recipe.ppo, recipe.segmenter.segmentation
  rows = {'ends': [], 'dense': [], 'reward': [], 'advantage': []}
  floor = max(recipe.shaping.std_floor_ratio * NORMALIZER[3], 1e-6)
  lists = {name: np.asarray(x, np.float64).tolist() for name, x in outputs._asdict().items()}
  for row, (after, mask, finished) in enumerate(batch.rows('entropy_after', 'mask', 'finished')):
    ends = oracle.segment_ends(after, mask, finished, segmentation.granularity, 2.0)
    z = oracle.segment_z(lists['score'][row], ends, NORMALIZER, floor)
    dense = oracle.spread(z, ends, mask, recipe.spread)
    kl = np.subtract(lists['old_logprob'][row], lists['ref_logprob'][row])
    clipped = np.clip(dense, -recipe.shaping.reward_clip, recipe.shaping.reward_clip)
    reward = np.where(mask, clipped - ppo.kl_coef * kl, 0.0).tolist()
    advantage = oracle.gae(reward, lists['value'][row], mask, ppo.gamma, ppo.gae_lambda)
    for name, x in (('ends', ends), ('dense', dense), ('reward', reward), ('advantage', advantage)):
      rows[name].append(x)
  return rows


def positions_and_z(batch, outputs, ends_of_rows):
  """Returns (p, z) of every segment: its relative position and normalised score."""
  floor = max(RewardShaping().std_floor_ratio * NORMALIZER[3], 1e-6)
  pairs = []
  for row, ends in zip(np.asarray(outputs.score, float).tolist(), ends_of_rows, strict=True):
    z = oracle.segment_z(row, ends, NORMALIZER, floor)
    pairs += [((k + 1) / len(ends), x) for k, x in enumerate(z)]
  return pairs


def assert_by_position(metrics, pairs):
  """Checks that reward/by_position/k is the mean of z, not of a dense reward, over a tenth."""
  for k in range(1, 11):
    values = [z for p, z in pairs if (k - 1) / 10 < p - 1e-9 and p <= k / 10 + 1e-9]
    mean = np.mean(values) if values else np.nan
    assert_allclose(metrics[f'reward/by_position/{k}'], mean, rtol=1e-4, atol=1e-4)


def test_z_by_position_of_three_segments():
  """Ends at tokens 0, 2, 3; p = 1/3, 2/3, 1, in the 4th, 7th and 10th tenth."""
  segments = Segments(
    start=jnp.array([[True, True, False, True]]),
    end=jnp.array([[True, False, True, True]]),
    segment_id=jnp.array([[0, 1, 1, 2]]),
    num_segments=jnp.array([3]),
  )
  means = z_by_position(jnp.array([[0.5, 9.0, -1.0, 2.0]]), segments)
  values = {k: float(means[f'reward/by_position/{k}']) for k in range(1, 11)}
  assert {k: x for k, x in values.items() if not np.isnan(x)} == {4: 0.5, 7: -1.0, 10: 2.0}


def scored_batch(seed=3):
  """Returns (batch, rollout, outputs of the networks), random but for the layout."""
  batch = make_batch(seed=seed, begin_anywhere=False)
  rng = np.random.default_rng(seed + 1)
  rows = len(batch.mask)
  logprob = -np.abs(rng.normal(size=(2, rows, LENGTH))).astype(np.float32)
  outputs = ModelOutputs(
    old_logprob=jnp.asarray(np.where(batch.mask, logprob[0], 0)),
    ref_logprob=jnp.asarray(logprob[1]),
    ref_entropy=jnp.asarray(batch.entropy),
    score=jnp.asarray(batch.score * 5),
    value=jnp.asarray(batch.value),
    prompt_score=jnp.zeros(rows),
  )
  rollout = Rollout(
    prompt_ids=jnp.zeros((rows, 1), jnp.int32),
    prompt_length=jnp.ones(rows, jnp.int32),
    response_ids=jnp.zeros((rows, LENGTH), jnp.int32),
    response_mask=jnp.asarray(batch.mask),
    finished=jnp.asarray(batch.finished),
    old_logprob=jnp.full((rows, LENGTH), jnp.nan),  # replaced by that of `outputs`
  )
  return batch, rollout, outputs


@pytest.mark.parametrize(
  ('granularity', 'spread'),
  [('segment', 'even_split'), ('token', 'even_split'), ('bandit', 'bandit'), ('segment', 'repeat')],
)
def test_experience_equals_oracle(granularity, spread):
  batch, rollout, outputs = scored_batch()
  recipe = training.recipe(
    spread=spread,
    segmenter=training.segmenter(granularity, 2.0),
    shaping=RewardShaping(reward_clip=4.0),
  )
  normalizer = Normalizer(*map(jnp.float32, NORMALIZER))
  experience, metrics = jax.device_get(
    make_experience(rollout, outputs, normalizer, jnp.float32(recipe.ppo.kl_coef), recipe=recipe)
  )
  expected = by_loops(batch, outputs, recipe)
  masks = batch.mask.tolist()
  lengths = [len(ends) for ends in expected['ends']]
  assert [np.flatnonzero(row).tolist() for row in experience.segments.end] == expected['ends']
  assert experience.segments.num_segments.tolist() == lengths
  # float32 against float64, rewards up to 40.
  assert_allclose(experience.reward, expected['reward'], atol=1e-4)
  assert np.abs(expected['dense']).max() > 4  # some reward was clipped
  advantage = np.array(expected['advantage'])
  assert_allclose(experience.advantage, oracle.whiten(advantage.tolist(), masks), atol=1e-4)
  return_ = np.where(batch.mask, advantage + batch.value, 0)
  assert_allclose(experience.return_, return_, atol=2e-4)
  np.testing.assert_array_equal(experience.rollout.old_logprob, outputs.old_logprob)

  expected_z = positions_and_z(batch, outputs, expected['ends'])
  assert_by_position(metrics, expected_z)
  entropy = -np.where(batch.mask, outputs.old_logprob, 0).sum(axis=1)
  assert_allclose(metrics['objective/entropy'], entropy.mean(), rtol=1e-5)  # as TRL, per response
  kl = np.where(batch.mask, np.asarray(outputs.old_logprob) - np.asarray(outputs.ref_logprob), 0)
  assert_allclose(metrics['objective/kl'], kl.sum(axis=1).mean(), rtol=1e-5)
  assert_allclose(metrics['objective/kl_token_max'], np.abs(kl).max(), rtol=1e-5)
  assert_allclose(metrics['response/length_mean'], batch.mask.sum(axis=1).mean(), rtol=1e-6)
  assert_allclose(metrics['segments/per_response'], np.mean(lengths), rtol=1e-6)
  assert_allclose(metrics['response/eos_rate'], batch.finished.mean(), rtol=1e-6)
  assert_allclose(metrics['objective/reward'], np.sum(expected['dense'], axis=1).mean(), rtol=1e-4)
  error = (return_ - batch.value)[batch.mask]
  explained = 1 - error.var() / return_[batch.mask].var()
  assert_allclose(metrics['critic/explained_variance'], explained, atol=1e-4)


@pytest.mark.parametrize(
  'level, changes',
  [('border', {}), ('token', {'value_gae_lambda': 1.0}), ('token', {'lambda_length_factor': 0.5})],
)
def test_policy_and_critic_have_their_own_lambda(plain_outputs, level, changes):
  ppo = dataclasses.replace(training.PPO_SETTINGS, whiten=False, gae_level=level, **changes)
  experience, _ = experience_of(plain_outputs, ppo)
  batch, segments = plain_outputs[0], experience.segments
  for row, mask in enumerate(batch.mask.tolist()):
    reward, value = np.asarray(experience.reward[row]).tolist(), batch.value[row].tolist()
    gae_lambda = critic_lambda = ppo.gae_lambda
    if ppo.lambda_length_factor:
      gae_lambda = max(1 - 1 / (0.5 * max(sum(mask), 1)), 0)
    if ppo.value_gae_lambda is not None:
      critic_lambda = ppo.value_gae_lambda
    starts = mask
    if level == 'border':  # the stop token is outside all segments
      starts = np.asarray(segments.start[row] | (segments.segment_id[row] < 0)).tolist()
    advantage, target = (
      oracle_advantages.border_gae(reward, value, starts, mask, ppo.gamma, x)
      for x in (gae_lambda, critic_lambda)
    )
    assert_allclose(experience.advantage[row], advantage, atol=2e-4)
    assert_allclose(experience.return_[row], np.where(mask, np.add(target, value), 0), atol=2e-4)


def test_groups_are_adjacent_rows(plain_outputs):
  """The first four responses are to one prompt, the others do not count."""
  ppo = dataclasses.replace(training.PPO_SETTINGS, whiten=False, estimator='rloo')
  experience, metrics = experience_of(plain_outputs, ppo, samples_per_prompt=4)
  rewards = np.asarray(experience.reward[:4]).tolist()
  masks = plain_outputs[0].mask[:4].tolist()
  expected = oracle_advantages.leave_one_out(rewards, masks, ppo.gamma)
  assert_allclose(experience.advantage[:4], expected, atol=2e-4)
  assert experience.value is experience.return_ is experience.value_mask is None
  assert not any('critic' in name for name in metrics) and within_bounds(metrics, ppo)


def test_chunks_of_short_rows_are_narrower(params, rollout, length, monkeypatch):
  """Rows return in their original order, whatever width they were scored at."""
  monkeypatch.setattr(rollout_scoring, '_SMALLEST_STEP', 4)
  widths, real = [], rollout_scoring.score_chunk

  def recording(params, ids, *rest, **static):
    widths.append(ids.shape[1])
    return real(params, ids, *rest, **static)

  monkeypatch.setattr(rollout_scoring, 'score_chunk', recording)
  narrow = score(params, rollout, length, recipe=RECIPE)
  monkeypatch.undo()
  assert widths[0] < widths[1] <= training.PROMPT + training.RESPONSE
  expected = score(params, rollout, length, recipe=ONE_BATCH)
  mask = np.asarray(rollout.response_mask)
  for name in ('ref_logprob', 'ref_entropy', 'score', 'value'):
    got, want = np.asarray(getattr(narrow, name)), np.asarray(getattr(expected, name))
    assert_allclose(got[mask], want[mask], atol=3e-5, err_msg=name)


@pytest.fixture(scope='module')
def plain_outputs():
  return scored_batch()


def experience_of(scored, ppo=training.PPO_SETTINGS, samples_per_prompt=1, **changed):
  """Returns (experience, metrics) with outputs of the networks changed."""
  _, rollout, outputs = scored
  recipe = training.recipe(
    segmenter=training.segmenter('segment', 2.0),
    ppo=ppo,
    shaping=RewardShaping(reward_clip=0.0),
    samples_per_prompt=samples_per_prompt,
  )
  normalizer = Normalizer(*map(jnp.float32, NORMALIZER))
  outputs = outputs._replace(**({} if ppo.has_critic else {'value': None}), **changed)
  return make_experience(rollout, outputs, normalizer, jnp.float32(0.1), recipe=recipe)


def test_reward_clip_of_0_is_off(plain_outputs):
  experience, metrics = experience_of(plain_outputs)
  expected = by_loops(
    *(plain_outputs[0], plain_outputs[2]),
    training.recipe(
      segmenter=training.segmenter('segment', 2.0), shaping=RewardShaping(reward_clip=1e9)
    ),
  )
  assert metrics['reward/token_abs_max'] > 1
  assert_allclose(experience.reward, expected['reward'], atol=1e-4)


K3 = dataclasses.replace(training.PPO_SETTINGS, kl_estimator='k3')


def test_k3_of_a_token_that_the_policy_excludes(plain_outputs):
  """A log-ratio of 100, whose exponential overflows, leaves all advantages finite."""
  _, rollout, outputs = plain_outputs
  row, t = np.argwhere(np.asarray(rollout.response_mask))[3]
  ref_logprob = outputs.ref_logprob.at[row, t].set(outputs.old_logprob[row, t] + 100)
  experience, metrics = experience_of(plain_outputs, K3, ref_logprob=ref_logprob)
  for x in (experience.reward, experience.advantage, experience.return_):
    assert np.all(np.isfinite(x))
  assert within_bounds(metrics, K3)


@pytest.mark.parametrize(
  'name, value', [('score', np.nan), ('value', np.inf), ('value', np.nan), ('ref_logprob', -np.inf)]
)
def test_nothing_is_learned_from_what_is_not_finite(plain_outputs, name, value):
  """One token spoils the advantages of all by whitening, whatever KL and rewards say."""
  _, rollout, outputs = plain_outputs
  row = np.argwhere(np.asarray(rollout.response_mask))[3, 0]
  assert within_bounds(experience_of(plain_outputs)[1], training.PPO_SETTINGS)
  changed = {name: getattr(outputs, name).at[row].set(value)}
  experience, metrics = experience_of(plain_outputs, **changed)
  assert not np.all(np.isfinite(experience.advantage))
  assert not within_bounds(metrics, training.PPO_SETTINGS)


FINITE = dict.fromkeys(
  ('objective/rlhf_reward', 'objective/advantage_abs_max', 'critic/return_abs_max'), 1.0
)


@pytest.mark.parametrize(
  'kl, reward, bounds, expected',
  [
    (9.0, 9.0, {}, True),
    (2.0, 9.0, {'skip_if_kl_above': 2.0}, True),
    (2.1, 0.0, {'skip_if_kl_above': 2.0}, False),
    (-2.1, 0.0, {'skip_if_kl_above': 2.0}, False),  # an estimate may be below zero
    (0.0, 2.1, {'skip_if_reward_above': 2.0}, False),
    (np.nan, 0.0, {}, False),
    (0.0, np.inf, {}, False),
  ],
)
def test_rollouts_within_bounds(kl, reward, bounds, expected):
  metrics = FINITE | {'objective/kl': kl, 'reward/token_abs_max': reward}
  assert bool(within_bounds(metrics, PPO(**bounds))) == expected
