"""From rollouts to what PPO learns from: reference, reward model and critic, then the rewards.

`score`             the three networks over the sequences, in pieces of `ppo.score_batch`
`make_experience`   segments, normalised and spread rewards, KL, GAE: arrays only
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from segjax.model import sharding
from segjax.model.heads import scores, token_logprobs, values
from segjax.model.llama import LlamaConfig
from segjax.rl import kl
from segjax.rl.masked import masked_mean, masked_sum, whiten
from segjax.rl.normalizer import normalize
from segjax.rl.returns import gae, returns
from segjax.rl.rewards import dense_reward, shaped_reward
from segjax.rl.segmentation import segment
from segjax.settings import PPO
from segjax.train.rollout import concatenate
from segjax.types import Experience, Normalizer, Rollout


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is fixed over a PPO run: the four networks, how text is cut, the constants."""

  policy: LlamaConfig
  reference: LlamaConfig
  reward: LlamaConfig
  critic: LlamaConfig
  granularity: str
  entropy_threshold: float
  spread: str
  ppo: PPO
  recompute_logprob: bool = False


class Scores(NamedTuple):
  """What the networks say of each response token; see `segjax.types` for the alignment."""

  old_logprob: Float[Array, 'B T']
  ref_logprob: Float[Array, 'B T']
  entropy: Float[Array, 'B T']
  score: Float[Array, 'B T']
  value: Float[Array, 'B T']


def join(rollout: Rollout) -> Int[Array, 'B S']:
  """Prompt and response as one sequence padded on the right, S = P + T."""
  size = rollout.prompt_ids.shape[1]
  both = jnp.concatenate([rollout.prompt_ids, rollout.response_ids], axis=1)
  position = jnp.arange(both.shape[1])[None]
  length = rollout.prompt_length[:, None]
  source = jnp.where(position < length, position, position - length + size)
  return jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1)


def response_window(
  x: Float[Array, 'B S'], prompt_length: Int[Array, 'B'], size: int
) -> Float[Array, 'B T']:
  """The `size` entries of each row that start at its response."""
  return jnp.take_along_axis(x, prompt_length[:, None] + jnp.arange(size)[None], axis=1)


@functools.partial(jax.jit, static_argnames='recipe')
def score_piece(
  params: dict[str, Any], ids: Int[Array, 'B S'], rollout: Rollout, *, recipe: Recipe
) -> Scores:
  """One forward of reference, reward model and critic (and policy, if log-probs are recomputed).

  Args:
    params: the trees 'policy', 'reference', 'reward' and, in training, 'critic'.
  """

  def window(x):
    return response_window(x, rollout.prompt_length, rollout.response_ids.shape[1])

  ref_logprob, entropy = token_logprobs(params['reference'], ids, recipe.reference)
  old_logprob = rollout.old_logprob
  if recipe.recompute_logprob:
    old_logprob = window(token_logprobs(params['policy'], ids, recipe.policy)[0])
  # Evaluation has no critic.
  value = jnp.zeros(ids.shape, jnp.float32)
  if 'critic' in params:
    value = values(params['critic'], ids, recipe.critic)
  return Scores(
    old_logprob=jnp.where(rollout.response_mask, old_logprob, 0.0),
    ref_logprob=window(ref_logprob),
    entropy=window(entropy),
    score=window(scores(params['reward'], ids, recipe.reward)),
    value=window(value),
  )


def score(params: dict[str, Any], rollout: Rollout, *, recipe: Recipe) -> Scores:
  """`score_piece` over the whole rollout, `ppo.score_batch` sequences at a time."""
  ids = jax.jit(join)(rollout)
  total = ids.shape[0]
  size = recipe.ppo.score_batch or total
  if size == total:
    return score_piece(params, ids, rollout, recipe=recipe)
  pieces = []
  for start in range(0, total, size):
    piece_ids, piece = take_rows((ids, rollout), jnp.arange(start, start + size))
    pieces.append(score_piece(params, piece_ids, piece, recipe=recipe))
  return concatenate(pieces)


@jax.jit
def take_rows(tree: Any, rows: Int[Array, 'N']) -> Any:
  """The rows of every array in the tree, split over the devices."""
  return jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), tree)


@functools.partial(jax.jit, static_argnames='recipe')
def make_experience(
  rollout: Rollout, scored: Scores, normalizer: Normalizer, *, recipe: Recipe
) -> tuple[Experience, dict[str, Array]]:
  """Dense rewards and advantages of a rollout, and what a person wants to know of them.

  reward_t = clamp(spread(z)_t) - kl_coef · kl_t, advantage by GAE, whitened over the whole rollout.
  Metrics are means over responses; `kl` is Σ_t (log π - log π_ref) per response, in nats.
  """
  ppo, mask = recipe.ppo, rollout.response_mask
  rollout = dataclasses.replace(rollout, old_logprob=scored.old_logprob)
  segments = jax.vmap(
    functools.partial(
      segment, granularity=recipe.granularity, entropy_threshold=recipe.entropy_threshold
    )
  )(scored.entropy, mask, rollout.finished)
  floor = None if ppo.std_floor_ratio < 0 else ppo.std_floor_ratio

  def reward_of(token_score, segments, mask, token_kl):
    z = normalize(token_score, segments, normalizer, floor)
    dense = dense_reward(z, segments, mask, spread=recipe.spread, length_norm=ppo.length_norm)
    shaped = shaped_reward(dense, token_kl, mask, kl_coef=ppo.kl_coef, clip=ppo.reward_clip)
    return dense, shaped

  token_kl = kl.ESTIMATORS[ppo.kl_estimator](scored.old_logprob, scored.ref_logprob)
  dense, reward = jax.vmap(reward_of)(scored.score, segments, mask, token_kl)
  advantage = jax.vmap(functools.partial(gae, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda))(
    reward, scored.value, mask
  )
  return_ = returns(advantage, scored.value, mask)
  experience = Experience(
    rollout=rollout,
    ref_logprob=scored.ref_logprob,
    entropy=scored.entropy,
    score=scored.score,
    value=scored.value,
    segments=segments,
    reward=reward,
    advantage=whiten(advantage, mask),
    return_=return_,
  )
  return experience, _metrics(experience, dense)


def _metrics(experience: Experience, dense: Float[Array, 'B T']) -> dict[str, Array]:
  rollout, mask = experience.rollout, experience.rollout.response_mask
  difference = rollout.old_logprob - experience.ref_logprob
  return {
    'reward': jnp.mean(masked_sum(dense, mask, axis=1)),
    'score': masked_mean(experience.score, experience.segments.end),
    'kl': jnp.mean(masked_sum(difference, mask, axis=1)),
    'kl_token_max': jnp.max(jnp.where(mask, jnp.abs(difference), 0.0)),
    'entropy_ref': masked_mean(experience.entropy, mask),
    'length': jnp.mean(_count(mask)),
    'segments': jnp.mean(experience.segments.num_segments.astype(jnp.float32)),
    'finished': jnp.mean(rollout.finished.astype(jnp.float32)),
    'explained_variance': _explained_variance(experience.value, experience.return_, mask),
  }


def _count(mask: Bool[Array, 'B T']) -> Float[Array, 'B']:
  return jnp.sum(mask, axis=1).astype(jnp.float32)


def _explained_variance(value, return_, mask):
  """1 - Var(return - value) / Var(return) over the response tokens."""

  def variance(x):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

  return 1 - variance(return_ - value) / jnp.maximum(variance(return_), 1e-8)
