"""Dense rewards from scores: the order of the steps, and the effect of each option."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from numpy.testing import assert_allclose

from segjax.config.settings import Compat, LMReward, RewardShaping, Segmentation
from segjax.train.reward_mixing import reward_parts
from segjax.train.reward_shaping import dense_rewards, segment_z
from segjax.train.scoring import ModelOutputs
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.types import Normalizer, Rollout

# Two responses of five and six tokens, segments of two tokens; the first ends by itself.
MASK = np.array([[1, 1, 1, 1, 1, 0], [1] * 6], bool)
FINISHED = np.array([True, False])
SCORE = np.array([[9, 1, 9, 3, 6, 9], [9, 2, 9, 0, 9, 4]], np.float32)
PROMPT_SCORE = np.array([0.5, -1.0], np.float32)
# Log-probs by the language model that rewards; the reference's are 0, the policy's too.
LM_LOGPROB = np.array([[-1, -3, 1, 1, 2, 9], [-0.5, 0, 0, 0, 0, 0]], np.float32)
NORMALIZER = Normalizer(*map(jnp.float32, (0.0, 0.0, 1.0, 2.0)))


def dense(
  spread='even_split',
  custom=None,
  compat=Compat(),  # noqa: B008
  include_eos=False,
  lm=None,
  **shaping,
):
  segmentation = Segmentation(boundary='fixed_length', segment_length=2, include_eos=include_eos)
  recipe = training.recipe(
    spread=spread,
    segmenter=Segmenter(segmentation),
    shaping=RewardShaping(std_floor_ratio=0.0, lm_reward=lm or LMReward(), **shaping),
    compat=compat,
    reward_lm=None if lm is None else models.CONFIG,
  )
  zeros = jnp.zeros(MASK.shape)
  rollout = Rollout(
    prompt_ids=jnp.zeros((2, 4), jnp.int32),
    prompt_length=jnp.array([4, 2]),
    response_ids=zeros.astype(jnp.int32),
    response_mask=jnp.asarray(MASK),
    finished=jnp.asarray(FINISHED),
    old_logprob=zeros,
  )
  segments = segment_batch(
    rollout.response_ids, rollout.response_mask, rollout.finished, zeros, recipe.segmenter
  )
  scores = jnp.asarray(SCORE), zeros, jnp.asarray(PROMPT_SCORE)
  entropy = jnp.tile(jnp.array([1.0, 3.0]), (2, 3))
  outputs = ModelOutputs(*[zeros] * 2, entropy, *scores, lm_logprob=jnp.asarray(LM_LOGPROB))
  z = segment_z(outputs, segments, rollout, NORMALIZER, recipe.shaping)
  custom = None if custom is None else jnp.asarray(custom, jnp.float32)
  parts, _ = reward_parts(z, segments, rollout, outputs, custom, None, recipe=recipe)
  return np.asarray(dense_rewards(parts, rollout, recipe=recipe))


def test_plain():
  assert_allclose(dense(), [[0, 0, 0.5, 0.5, 0, 0], [0.25, 0.25, -0.25, -0.25, 0.75, 0.75]])
  assert_allclose(dense('bandit'), [[0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 0.5]])
  by_length = dense(length_norm=True)
  assert_allclose(by_length * [[5], [6]], dense(), rtol=1e-6)


def test_entropy_weights_and_min_credit():
  assert_allclose(dense('entropy_weighted'), dense() * np.tile([0.5, 1.5], 3))
  # z is 0 and 1 in the first response, 0.5, -0.5 and 1.5 in the second.
  weight = np.exp(-np.array([0.5, -0.5, 1.5]) / 0.5)
  expected = [0, 1 / (1 + np.exp(2)), *np.array([0.5, -0.5, 1.5]) * weight / weight.sum()]
  at_ends = dense('end_only', credit='min', credit_temperature=0.5)
  assert_allclose(at_ends[[0, 0, 1, 1, 1], [1, 3, 1, 3, 5]], expected, rtol=1e-5)


@pytest.mark.parametrize('baseline', ['prompt', 'zero'])
def test_red_adds_up_to_the_score_of_the_response(baseline):
  """The stop token lies in the last segment, so the score is that at the response's end."""
  at_ends = dense('end_only', include_eos=True, redistribute='red', red_baseline=baseline)
  total = (np.array([6, 4]) - 1) / 2
  before = (PROMPT_SCORE - 1) / 2 if baseline == 'prompt' else 0
  assert_allclose(at_ends.sum(axis=1), total - before, rtol=1e-6)
  spread_out = dense(include_eos=True, redistribute='red', red_baseline=baseline)
  assert_allclose(spread_out.sum(axis=1), total - before, rtol=1e-6)
  # First segment of the first response: (1 - 1) / 2 minus the baseline.
  assert_allclose(at_ends[0, 1], 0 - (before[0] if baseline == 'prompt' else 0))
  assert_allclose(at_ends[0, 4], (6 - 1) / 2)  # the second: from score 1 at token 1 to 6


def test_custom_rewards_are_mixed_by_weights():
  custom = np.where(MASK, [[1.0] * 6, [2.0] * 6], 0)
  mixed = dense(custom=custom, reward_fn_weight=0.5, reward_model_weight=2.0)
  assert_allclose(mixed, 2 * dense() + 0.5 * custom, rtol=1e-6)
  assert_allclose(dense(custom=custom, reward_model_weight=0.0), custom)


def test_a_language_model_rewards_tokens_or_segments():
  by_token = np.where(MASK, np.clip(0.5 * LM_LOGPROB, -1, 1), 0)
  lm = LMReward('', 'implicit', coef=0.5, clip=1.0)
  assert_allclose(dense(lm=lm), dense() + by_token, rtol=1e-6)
  assert_allclose(dense(lm=lm, reward_model_weight=0.0), by_token)
  # -1/2 and -1 over the first segment, 1 over the second; the stop token keeps its own 1.
  by_segment = dense(lm=dataclasses.replace(lm, level='segment'), reward_model_weight=0.0)
  assert_allclose(by_segment[0], [-0.75, -0.75, 0.5, 0.5, 1, 0])
  assert_allclose(by_segment.sum(axis=1), by_token.sum(axis=1))


def test_penalties_come_after_the_mix():
  custom = np.where(MASK, 1.0, 0)
  penalized = dense(custom=custom, missing_eos_penalty='per_token', missing_eos_penalty_value=-0.05)
  assert_allclose(penalized[1], [-0.05] * 6)  # unfinished: instead of everything
  assert_allclose(penalized[0], dense(custom=custom)[0])
  added = dense(missing_eos_penalty='at_eos', missing_eos_penalty_value=-3.0) - dense()
  assert_allclose(added, [[0] * 6, [0] * 5 + [-3]])
  too_long = dense(length_penalty='threshold', length_penalty_value=-1.0, length_threshold=5)
  assert_allclose(too_long, [dense()[0], [-1] * 6])
  linear = dense(length_penalty='linear', length_penalty_value=-1.0, length_threshold=4) - dense()
  assert_allclose(linear, [[0, 0, 0, 0, -1, 0], [0, 0, 0, 0, -1, -1]])


def test_published_code_subtracts_the_padded_prompt():
  penalty = {'length_penalty': 'threshold', 'length_threshold': 1, 'length_penalty_value': -1.0}
  assert (dense(**penalty)[MASK] == -1).all()
  # Prompts of 4 and 2 padded to 4: lengths 1 and 2, of which only the second passes 1.
  penalized = dense(compat=Compat(padded_length=True), **penalty)
  assert_allclose(penalized, [dense()[0], [-1] * 6])


def test_published_code_does_not_penalise_bandit_rewards():
  penalty = {'missing_eos_penalty': 'per_token', 'missing_eos_penalty_value': -0.05}
  assert_allclose(dense('bandit', **penalty)[1], [-0.05] * 6)
  spared = Compat(bandit_skips_penalties=True)
  assert_allclose(dense('bandit', compat=spared, **penalty), dense('bandit'))
  assert_allclose(dense(compat=spared, **penalty)[1], [-0.05] * 6)
