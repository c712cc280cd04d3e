"""Rows of data scored by a reward model that reads text, against one that reads the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, runs, tokenizers, training

from segjax.config.settings import Segmentation
from segjax.data.tokenizer import load_tokenizer
from segjax.model import sharding
from segjax.train.reward_scoring import (
  SegmentScorer,
  evaluate_pairs,
  score_sequences,
  segment_rewards,
  segment_statistics,
)
from segjax.train.segmenter import Segmenter
from segjax.train.text_reward import TextReward, TextSegments
from segjax.train.text_scoring import TextScorer
from segjax.types import Normalizer, PreferenceBatch, Sequences

NETWORK = runs.FOREIGN
PROMPTS = [[tokenizers.user(text)] for text in ('one', 'two 日本', 'three')]
SIDES = (
  ['hello there, how are you?', 'the quick brown fox', 'é 日本 a\u0301 👩‍👩‍👧'],
  ['hello', 'é 日本 the', 'brown fox, 2 + 2'],
)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(tokenizers.write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


@pytest.fixture(scope='module')
def params():
  mesh = models.mesh(1)
  return [training.network(name, mesh, NETWORK) for name in ('reward', 'reference')]


def rows_of(tokenizer, texts):
  """Returns these responses to the prompts, finished but for the second."""
  ids, mask = np.zeros((3, 64), np.int32), np.zeros((3, 64), bool)
  for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
    before, own = tokenizer.prompt_ids(prompt), tokenizer.response_ids(prompt, text)
    own = own[: len(own) - (row == 1)]
    ids[row, : len(before) + len(own)] = before + own
    mask[row, len(before) : len(before) + len(own)] = True
  return Sequences(*map(jnp.asarray, (ids, mask, np.array([True, False, True]))))


def make(tokenizer, segmentation):
  scorer = SegmentScorer(NETWORK, NETWORK, Segmenter(segmentation))
  text = TextScorer(NETWORK, tokenizer, models.mesh(1))
  return scorer, TextSegments(TextReward(text, tokenizer), scorer)


@pytest.mark.parametrize(
  'segmentation',
  [
    pytest.param(Segmentation(entropy_threshold=5.5), marks=pytest.mark.campaign),
    pytest.param(Segmentation(granularity='bandit', include_eos=True), marks=pytest.mark.campaign),
  ],
)
def test_the_references_own_tokenizer_gives_the_scores_of_its_tokens(
  tokenizer, params, segmentation
):
  scorer, text = make(tokenizer, segmentation)
  pairs = PreferenceBatch(*(rows_of(tokenizer, side) for side in SIDES), None)
  filled = text.add_pair_scores(*params, pairs, PROMPTS)
  position, score, end, total = segment_statistics(*params, pairs, scorer=scorer)
  # No network is run again: the scores are there.
  found = segment_statistics(None, None, filled, scorer=scorer)
  np.testing.assert_array_equal(found[2], end)
  assert np.asarray(end).any(1).all()
  for x, expected in zip(found[:2], (position, score), strict=True):
    np.testing.assert_allclose(x[end], expected[end], atol=1e-5)
  np.testing.assert_allclose(found[3], total, atol=1e-5)
  np.testing.assert_allclose(
    evaluate_pairs(None, None, filled, scorer=scorer),
    evaluate_pairs(*params, pairs, scorer=scorer),
    atol=1e-5,
  )
  normalizer = jax.tree.map(jnp.float32, Normalizer(w_mean=0.2, b_mean=0.3, b_std=0.7))
  rewards = functools.partial(segment_rewards, normalizer=normalizer, scorer=scorer)
  z, segments = rewards(*params, pairs.chosen)
  own, _ = rewards(None, None, text.add_scores(*params, pairs.chosen, PROMPTS))
  np.testing.assert_allclose(own[segments.end], z[segments.end], atol=1e-5)


def test_options_are_read_at_the_ends_that_are_kept(tokenizer, params):
  scorer, text = make(tokenizer, Segmentation(entropy_threshold=5.5))
  sequences = rows_of(tokenizer, ['hello there', 'the quick brown fox', 'one two three'])
  expected, _ = jax.jit(functools.partial(score_sequences, scorer=scorer))(*params, sequences)
  read = text.option_reader(lambda number: PROMPTS[number])
  mask = np.asarray(sequences.response_mask)
  ends = mask & (np.arange(mask.shape[1]) % 3 == 0)
  both = dict(zip(('reward', 'reference'), params, strict=True))
  found = np.asarray(read(both, sequences, np.arange(3), jnp.asarray(ends)).score)
  np.testing.assert_allclose(found[ends], np.asarray(expected)[ends], atol=1e-5)
  assert not found[~ends].any()


@pytest.mark.devices
def test_eight_devices_agree_with_one(tokenizer):
  segmentation, found = Segmentation(boundary='fixed_length', segment_length=3), []
  for count in (1, 8):
    mesh = models.mesh(count)
    with jax.set_mesh(mesh):
      params = [training.network(name, mesh, NETWORK) for name in ('reward', 'reference')]
      scorer = SegmentScorer(NETWORK, NETWORK, Segmenter(segmentation))
      text = TextSegments(TextReward(TextScorer(NETWORK, tokenizer, mesh), tokenizer), scorer)
      arrays = jax.tree.map(lambda x: np.resize(x, (8, *x.shape[1:])), rows_of(tokenizer, SIDES[0]))
      sequences = sharding.place_batch(arrays, mesh)
      filled = text.add_scores(*params, sequences, [PROMPTS[row % 3] for row in range(8)])
      found.append(np.asarray(filled.score))
      assert filled.score.sharding.device_set == set(mesh.devices.flat)
  assert found[0].any(axis=1).all()
  np.testing.assert_allclose(*found, atol=1e-5)
