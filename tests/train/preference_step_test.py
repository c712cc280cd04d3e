"""Scores of pairs against the oracle, and the training step on them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.compiles import compiled
from numpy.testing import assert_allclose

from segjax.rl import oracle, oracle_lm_rewards
from segjax.train.implicit_scoring import ImplicitScorer
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.reward_scoring import evaluate_pairs, segment_statistics


@pytest.fixture(scope='module')
def networks():
  mesh = models.mesh(1)
  return {name: training.network(name, mesh) for name in ('reward', 'reference')}


def segment_ends(sequences, reference, granularity):
  """Returns the last token of each segment of each row, by the oracle."""
  _, entropy = models.token_logprobs(reference, sequences.ids, models.CONFIG)
  after = np.pad(np.asarray(entropy)[:, 1:], ((0, 0), (0, 1)), constant_values=99.0)
  rows = zip(
    after.tolist(),
    np.asarray(sequences.response_mask).tolist(),
    np.asarray(sequences.finished).tolist(),
    strict=True,
  )
  return [oracle.segment_ends(*row, granularity, training.THRESHOLD) for row in rows]


def expected_scores(networks, granularity):
  """Returns the mean score at the ends of the segments, [B, 2]."""
  pairs, columns = training.pairs(), []
  for sequences in (pairs.chosen, pairs.rejected):
    score = np.asarray(models.scores(networks['reward'], sequences.ids, models.CONFIG))
    ends = segment_ends(sequences, networks['reference'], granularity)
    columns.append([row[e].mean() if e else 0.0 for row, e in zip(score, ends, strict=True)])
  return np.array(columns).T


@pytest.mark.parametrize('granularity', ['segment', 'token', 'bandit'])
def test_scores_equal_oracle(networks, granularity):
  scorer = dataclasses.replace(training.SCORER, segmenter=training.segmenter(granularity))
  # Token and bandit granularity do not need the reference.
  reference = networks['reference'] if granularity == 'segment' else None
  got = evaluate_pairs(networks['reward'], reference, training.pairs(), scorer=scorer)
  assert_allclose(got, expected_scores(networks, granularity), atol=1e-5)  # float32


IMPLICIT = ImplicitScorer(models.CONFIG, models.CONFIG, beta=0.1)


def test_implicit_rewards_equal_oracle(networks):
  policy = models.place(models.params(models.CONFIG, seed=4), models.mesh(1))
  pairs = training.pairs()
  got = evaluate_pairs(policy, networks['reference'], pairs, scorer=IMPLICIT)
  for side, sequences in enumerate((pairs.chosen, pairs.rejected)):
    ours, theirs = (
      np.asarray(models.token_logprobs(params, sequences.ids, models.CONFIG)[0]).tolist()
      for params in (policy, networks['reference'])
    )
    mask = np.asarray(sequences.response_mask).tolist()
    expected = [
      oracle_lm_rewards.implicit_reward(*rows, 0.1) for rows in zip(ours, theirs, mask, strict=True)
    ]
    assert_allclose(got[:, side], expected, atol=1e-5)  # float32


def test_longer_padding_changes_nothing(networks):
  short, long = (
    evaluate_pairs(
      networks['reward'],
      networks['reference'],
      training.pairs(length=length),
      scorer=training.SCORER,
    )
    for length in (16, models.LENGTH)
  )
  assert_allclose(short, long, atol=1e-5)  # float32


def test_statistics_cover_both_sides(networks):
  position, score, end, _ = jax.device_get(
    segment_statistics(
      networks['reward'], networks['reference'], training.pairs(), scorer=training.SCORER
    )
  )
  pairs = training.pairs()
  for side, sequences in enumerate((pairs.chosen, pairs.rejected)):
    expected = np.asarray(models.scores(networks['reward'], sequences.ids, models.CONFIG))
    for row, ends in enumerate(segment_ends(sequences, networks['reference'], 'segment')):
      index = 2 * row + side  # chosen and rejected in turn
      assert np.flatnonzero(end[index]).tolist() == ends
      positions = [(i + 1) / len(ends) for i in range(len(ends))]
      assert_allclose(position[index][ends], positions, rtol=1e-6)
      assert_allclose(score[index][ends], expected[row][ends], atol=1e-5)


def test_no_gradient_reaches_the_reference(networks):
  """Its entropies choose the boundaries of segments only."""
  pairs = training.pairs()

  def loss(reference):
    score, _ = training.SCORER.score_pairs(networks['reward'], reference, pairs)
    return jnp.sum(score**2)

  grads = jax.jit(jax.grad(loss))(networks['reference'])
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.campaign
def test_learns_one_batch(networks, caplog):
  state, history = training.state('reward'), []
  pairs = training.pairs()
  with compiled(caplog) as names:
    for _ in range(12):
      state, metrics = preference_step(
        state,
        FrozenParams(networks['reference']),
        pairs,
        scorer=training.SCORER,
        settings=training.REWARD,
        total_steps=training.TOTAL,
      )
      history.append(jax.device_get(metrics))
  assert names.count('preference_step') <= 1
  score = expected_scores(networks, 'segment')
  margin = score[:, 0] - score[:, 1]
  losses = [math.log1p(math.exp(-x)) for x in margin]
  assert_allclose(history[0]['loss'], np.mean(losses), rtol=1e-5)  # float32
  assert_allclose(history[0]['margin'], margin.mean(), rtol=1e-4, atol=1e-5)
  assert_allclose(history[0]['accuracy'], (margin > 0).mean())
  assert history[-1]['loss'] < history[0]['loss'] - 0.1
  assert history[-1]['accuracy'] >= history[0]['accuracy']
  assert int(state.step) == 12
  # The reference was neither donated nor changed.
  jax.tree.map(
    np.testing.assert_array_equal, networks['reference'], models.params(models.CONFIG, seed=0)
  )
