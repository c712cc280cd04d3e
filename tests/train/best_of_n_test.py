"""Best of n: whole responses are those of a rollout, segments are a greedy search over them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training

from segjax.errors import UserError
from segjax.train.best_of_n import Search, nothing_found, search
from segjax.train.reward_scoring import score_sequences
from segjax.train.rollout import response_tokens
from segjax.train.segmenter import sequence_scores
from segjax.types import Sequences

LIMIT = training.RESPONSE


def find(mesh, samples, temperature=1.0, **values):
  """Returns what is kept after each round."""
  params = {name: training.network(name, mesh) for name in ('policy', 'reference', 'reward')}
  rollout = dataclasses.replace(training.ROLLOUT, temperature=temperature)
  sampler = training.rollout_sampler(mesh, settings=rollout, samples_per_prompt=samples)
  settings = Search(sampler, training.SCORER, **values)
  found = nothing_found(models.BATCH, LIMIT, models.STOP_IDS[0])
  with jax.set_mesh(mesh):
    return list(search(params, training.PROMPTS, jax.random.key(5), settings, found))


@functools.cache
def scoring():
  """Returns a compiled function of padded sequences, apart from that of the search."""
  params = [training.network(name, models.mesh(1)) for name in ('reward', 'reference')]
  return jax.jit(lambda batch: score_sequences(*params, batch, training.SCORER))


def score_of(prompt, response, finished):
  """Returns (score, ends of segments in the response) of one response, scored alone."""
  length = len(prompt) + len(response)
  ids = np.zeros((1, training.PROMPT + LIMIT), np.int32)
  ids[0, :length] = [*prompt, *response]
  position = np.arange(ids.shape[1])[None]
  mask = (len(prompt) <= position) & (position < length)
  score, segments = scoring()(Sequences(*map(jnp.asarray, (ids, mask, [finished]))))
  segmentation = training.SCORER.segmenter.segmentation
  ends = np.flatnonzero(segments.end[0]) + 1 - len(prompt)
  return float(sequence_scores(score, segments, segmentation)[0]), ends


def prompts():
  return [x[:n] for x, n in zip(*map(np.asarray, training.PROMPTS), strict=True)]


@pytest.mark.campaign
def test_the_best_whole_response_is_that_of_a_rollout():
  mesh, samples = models.mesh(1), 3
  (found,) = find(mesh, samples)
  policy = training.network('policy', mesh)
  sampler = training.rollout_sampler(mesh, samples_per_prompt=samples)
  sampled = training.rollout(
    policy, training.PROMPTS, jax.random.fold_in(jax.random.key(5), 0), sampler
  )
  responses = response_tokens(sampled)
  for row, prompt in enumerate(prompts()):
    own = range(row * samples, row * samples + samples)
    scores = [score_of(prompt, responses[i], sampled.finished[i])[0] for i in own]
    best = own[int(np.argmax(scores))]
    kept = found.responses.response_ids[row][found.responses.response_mask[row]]
    np.testing.assert_array_equal(kept, responses[best])
    assert found.responses.finished[row] == sampled.finished[best]
    np.testing.assert_allclose(found.score[row], max(scores), atol=1e-4)


@pytest.mark.campaign
@pytest.mark.parametrize('segment_tokens', [2, 5])
def test_one_greedy_continuation_a_segment_is_the_greedy_response(segment_tokens):
  mesh = models.mesh(1)
  rounds = find(mesh, 1, temperature=0.0, segment_tokens=segment_tokens)
  greedy = dataclasses.replace(training.ROLLOUT, temperature=0.0)
  expected = training.sample(training.network('policy', mesh), settings=greedy)
  last = rounds[-1].responses
  assert len(rounds) > 1 and rounds[-1].is_over.all()
  np.testing.assert_array_equal(last.response_mask, expected.response_mask)
  mask = last.response_mask
  np.testing.assert_array_equal(last.response_ids[mask], expected.response_ids[mask])
  np.testing.assert_array_equal(last.finished, expected.finished)
  np.testing.assert_allclose(
    last.logprob[mask], np.asarray(expected.arrays.old_logprob)[mask], atol=1e-4
  )


@pytest.mark.campaign
def test_each_round_keeps_one_more_segment_of_what_stays():
  mesh = models.mesh(1)
  rounds = find(mesh, 4, segment_tokens=LIMIT)  # no segment is longer
  assert rounds[-1].is_over.all()
  for before, after in itertools.pairwise(rounds):
    kept = before.responses.response_mask
    assert after.responses.response_mask[kept].all()
    ids = after.responses.response_ids[kept]
    np.testing.assert_array_equal(ids, before.responses.response_ids[kept])
    assert (after.responses.response_mask.sum(1) > kept.sum(1))[~before.is_over].all()
  last = rounds[-1]
  for row, prompt in enumerate(prompts()):
    response = last.responses.response_ids[row][last.responses.response_mask[row]]
    score, ends = score_of(prompt, response, last.responses.finished[row])
    np.testing.assert_allclose(last.score[row], score, atol=1e-4)
    kept = {int(found.responses.response_mask[row].sum()) for found in rounds}
    # A stop token lies outside of all segments, behind the last one.
    assert set(ends.tolist()) | {len(response)} == kept | {int(ends[-1])}


@pytest.mark.campaign
def test_more_samples_find_higher_scores():
  one, many = (find(models.mesh(1), n, segment_tokens=LIMIT)[-1].score for n in (1, 4))
  assert many.mean() > one.mean()


@pytest.mark.devices
def test_eight_devices_find_what_one_finds():
  one, eight = (find(models.mesh(n), 2, segment_tokens=4)[-1] for n in (1, 8))
  mask = one.responses.response_mask
  np.testing.assert_array_equal(mask, eight.responses.response_mask)
  ids = eight.responses.response_ids
  np.testing.assert_array_equal(one.responses.response_ids[mask], ids[mask])
  np.testing.assert_allclose(one.score, eight.score, atol=1e-4)


def test_equal_samples_are_refused():
  with pytest.raises(UserError, match='temperature=0 samples equal responses'):
    find(models.mesh(1), 2, temperature=0.0)
