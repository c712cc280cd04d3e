"""Compares the rewards of random ragged responses with the slow loops of `segjax.rl.oracle`.

Runs no network; `selfcheck` checks the invariants of networks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from segjax.config.settings import PPO, Network, RewardShaping, Segmentation
from segjax.model.llama import make_config
from segjax.rl import oracle, oracle_spreads
from segjax.rl.spreads import SPREADS
from segjax.train.custom_reward import parse_token_rewards, token_rewards
from segjax.train.experience import make_experience
from segjax.train.recipe import PPORecipe
from segjax.train.response_functions import ResponseFunction, Responses
from segjax.train.scoring import ModelOutputs
from segjax.train.segmenter import Segmenter
from segjax.types import Normalizer, Rollout

_ROWS, _RESPONSE, _VOCABULARY = 8, 24, 256
_PPO = PPO(kl_coef=0.1)


def max_abs_error_vs_oracle(granularity: str) -> float:
  """Returns the largest error of rewards and whitened advantages against `segjax.rl.oracle`."""
  rollout, outputs = _random_scores(np.random.default_rng(5))
  error = 0.0
  for spread in SPREADS:
    recipe = _plain_recipe(Segmentation(granularity=granularity), spread)
    experience, _ = jax.device_get(
      make_experience(
        rollout, outputs, position_normalizer(), jnp.float32(_PPO.kl_coef), recipe=recipe
      )
    )
    expected = _by_loops(rollout, outputs, granularity, spread)
    for name, rows in expected.items():
      error = max(error, float(np.max(np.abs(getattr(experience, name) - np.array(rows)))))
  return error


def reward_roundtrip_error() -> float:
  """Returns the largest error with which a custom reward of 0.7 reaches the experience."""
  responses, scored = _random_scores(np.random.default_rng(6))
  ids, mask = jax.device_get((responses.response_ids, responses.response_mask))
  shaping = RewardShaping(reward_model_weight=0.0)
  reward = ResponseFunction(lambda prompt, response: 0.7, parse_token_rewards, str, shaping)
  asked = Responses([''] * len(ids), [x[m] for x, m in zip(ids, mask, strict=True)])
  custom_reward = token_rewards(reward(asked).values, mask)
  recipe = dataclasses.replace(_plain_recipe(Segmentation(), 'even_split'), shaping=shaping)
  experience, _ = make_experience(
    responses,
    scored,
    position_normalizer(),
    jnp.float32(0),
    jnp.asarray(custom_reward),
    recipe=recipe,
  )
  total = np.asarray(experience.reward).sum(axis=1)
  return float(np.max(np.abs(total - np.where(mask.any(axis=1), np.float32(0.7), 0))))


def position_normalizer() -> Normalizer:
  """Returns a normaliser whose Mean and Std change with the position."""
  return Normalizer(*map(jnp.float32, (0.2, -0.1, 0.3, 0.8)))  # in the order of its fields


def _plain_recipe(segmentation: Segmentation, spread: str) -> PPORecipe:
  """Returns a recipe for random arrays; its networks are not run."""
  config = make_config(Network(vocab_size=_VOCABULARY))
  return PPORecipe(*[config] * 4, Segmenter(segmentation), spread, RewardShaping(), _PPO)


def _random_scores(rng: np.random.Generator) -> tuple[Rollout, ModelOutputs]:
  """Returns responses of all lengths, among them an empty one and a single stop token."""
  length = rng.integers(0, _RESPONSE + 1, _ROWS)
  length[:3] = 0, 1, _RESPONSE
  mask = np.arange(_RESPONSE) < length[:, None]
  finished = (rng.random(_ROWS) < 0.5) & (length > 0)
  finished[1] = True
  shape = mask.shape
  logprob, ref_logprob, score_, value = rng.normal(size=(4, *shape)).astype(np.float32)
  entropy = (rng.integers(0, 14, shape) / 4).astype(np.float32)  # often equal to the threshold
  responses = Rollout(
    prompt_ids=jnp.zeros((_ROWS, 1), jnp.int32),
    prompt_length=jnp.ones(_ROWS, jnp.int32),
    response_ids=jnp.asarray(rng.integers(8, _VOCABULARY, shape).astype(np.int32)),
    response_mask=jnp.asarray(mask),
    finished=jnp.asarray(finished),
    old_logprob=jnp.zeros(shape),
  )
  arrays = (np.where(mask, logprob, 0), ref_logprob, entropy, score_, value, score_[:, 0])
  return responses, ModelOutputs(*map(jnp.asarray, arrays))


def _by_loops(responses: Rollout, scored: ModelOutputs, granularity: str, spread: str):
  """Returns rewards and whitened advantages, computed by loops over lists."""
  shaping = RewardShaping()
  fitted = tuple(float(x) for x in jax.tree.leaves(position_normalizer()))
  mask, finished = (np.asarray(x).tolist() for x in (responses.response_mask, responses.finished))
  logprob, ref_logprob, entropy, score_, values = (np.asarray(x).tolist() for x in scored[:5])
  # The oracle reads the entropy of the NEXT token at each one.
  after = np.pad(np.asarray(scored.ref_entropy)[:, 1:], ((0, 0), (0, 1))).tolist()
  floor = shaping.std_floor_ratio * fitted[3]
  rows, advantages = [], []
  for b in range(_ROWS):
    ends = oracle.segment_ends(after[b], mask[b], finished[b], granularity, 2.0)
    z = oracle.segment_z(score_[b], ends, fitted, floor)
    if spread == 'entropy_weighted':
      dense = oracle_spreads.entropy_weighted(z, ends, mask[b], entropy[b])
    else:
      dense = oracle.spread(z, ends, mask[b], spread)
    kl = [p - q for p, q in zip(logprob[b], ref_logprob[b], strict=True)]
    reward = oracle.shaped_reward(dense, kl, mask[b], _PPO.kl_coef, shaping.reward_clip)
    rows.append(reward)
    advantages.append(oracle.gae(reward, values[b], mask[b], _PPO.gamma, _PPO.gae_lambda))
  return {'reward': rows, 'advantage': oracle.whiten(advantages, mask)}
