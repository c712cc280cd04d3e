"""The order of the steps from scores to dense rewards, and what each switch adds."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segjax.config.settings import Compat, RewardShaping, Segmentation
from segjax.train.reward_shaping import dense_rewards
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.types import Normalizer, Rollout

# Two responses of five and six tokens, segments of two tokens; the first ends by itself.
MASK = np.array([[1, 1, 1, 1, 1, 0], [1] * 6], bool)
FINISHED = np.array([True, False])
SCORE = np.array([[9, 1, 9, 3, 6, 9], [9, 2, 9, 0, 9, 4]], np.float32)
PROMPT_SCORE = np.array([0.5, -1.0], np.float32)
NORMALIZER = Normalizer(*map(jnp.float32, (0.0, 0.0, 1.0, 2.0)))


def dense(spread='even_split', rule=None, compat=Compat(), inside=False, **shaping):  # noqa: B008
  cutting = Segmentation(boundary='fixed_length', segment_length=2, include_eos=inside)
  zeros = jnp.zeros(MASK.shape)
  ids = zeros.astype(jnp.int32)
  rollout = Rollout(
    prompt_ids=jnp.zeros((2, 4), jnp.int32),
    prompt_length=jnp.array([4, 2]),
    response_ids=ids,
    response_mask=jnp.asarray(MASK),
    finished=jnp.asarray(FINISHED),
    old_logprob=zeros,
  )
  segments = segment_batch(ids, rollout.response_mask, rollout.finished, zeros, Segmenter(cutting))
  rule = None if rule is None else jnp.asarray(rule, jnp.float32)
  return np.asarray(
    dense_rewards(
      jnp.asarray(SCORE),
      jnp.asarray(PROMPT_SCORE),
      segments,
      rollout,
      NORMALIZER,
      rule,
      shaping=RewardShaping(std_floor_ratio=0.0, **shaping),
      spread=spread,
      segmentation=cutting,
      compat=compat,
    )
  )


def test_plain():
  assert_allclose(dense(), [[0, 0, 0.5, 0.5, 0, 0], [0.25, 0.25, -0.25, -0.25, 0.75, 0.75]])
  assert_allclose(dense('bandit'), [[0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 0.5]])
  by_length = dense(length_norm=True)
  assert_allclose(by_length * [[5], [6]], dense(), rtol=1e-6)


@pytest.mark.parametrize('baseline', ['prompt', 'zero'])
def test_red_adds_up_to_the_score_of_the_whole(baseline):
  """The stop token lies in the last segment, so the score is that at the response's end."""
  found = dense('end_only', inside=True, redistribute='red', red_baseline=baseline)
  whole = (np.array([6, 4]) - 1) / 2
  before = (PROMPT_SCORE - 1) / 2 if baseline == 'prompt' else 0
  assert_allclose(found.sum(axis=1), whole - before, rtol=1e-6)
  spread_out = dense(inside=True, redistribute='red', red_baseline=baseline)
  assert_allclose(spread_out.sum(axis=1), whole - before, rtol=1e-6)
  # First segment of the first response: (1 - 1) / 2 less the baseline.
  assert_allclose(found[0, 1], 0 - (before[0] if baseline == 'prompt' else 0))
  assert_allclose(found[0, 4], (6 - 1) / 2)  # the second: from score 1 at token 1 to 6


def test_a_rule_is_mixed_by_weights():
  rule = np.where(MASK, [[1.0] * 6, [2.0] * 6], 0)
  found = dense(rule=rule, reward_fn_weight=0.5, reward_model_weight=2.0)
  assert_allclose(found, 2 * dense() + 0.5 * rule, rtol=1e-6)
  assert_allclose(dense(rule=rule, reward_model_weight=0.0), rule)


def test_penalties_come_after_the_mix():
  rule = np.where(MASK, 1.0, 0)
  found = dense(rule=rule, missing_eos_penalty='per_token', missing_eos_penalty_value=-0.05)
  assert_allclose(found[1], [-0.05] * 6)  # unfinished: instead of everything
  assert_allclose(found[0], dense(rule=rule)[0])
  added = dense(missing_eos_penalty='at_eos', missing_eos_penalty_value=-3.0) - dense()
  assert_allclose(added, [[0] * 6, [0] * 5 + [-3]])
  cut_off = dense(length_penalty='threshold', length_penalty_value=-1.0, length_threshold=5)
  assert_allclose(cut_off, [dense()[0], [-1] * 6])
  linear = dense(length_penalty='linear', length_penalty_value=-1.0, length_threshold=4) - dense()
  assert_allclose(linear, [[0, 0, 0, 0, -1, 0], [0, 0, 0, 0, -1, -1]])


def test_published_code_takes_the_padded_prompt_off_the_length():
  penalty = {'length_penalty': 'threshold', 'length_threshold': 1, 'length_penalty_value': -1.0}
  assert (dense(**penalty)[MASK] == -1).all()
  # Prompts of 4 and 2 padded to 4: lengths 1 and 2, of which only the second passes 1.
  found = dense(compat=Compat(padded_length=True), **penalty)
  assert_allclose(found, [dense()[0], [-1] * 6])


def test_published_code_spares_the_bandit():
  penalty = {'missing_eos_penalty': 'per_token', 'missing_eos_penalty_value': -0.05}
  assert_allclose(dense('bandit', **penalty)[1], [-0.05] * 6)
  spared = Compat(bandit_skips_penalties=True)
  assert_allclose(dense('bandit', compat=spared, **penalty), dense('bandit'))
  assert_allclose(dense(compat=spared, **penalty)[1], [-0.05] * 6)
