"""From rollouts to what PPO learns from: reference, reward model and critic, then the rewards.

`score`             the three networks over the sequences, in pieces of `ppo.scoring_batch_size`
`make_experience`   segments, dense rewards (`shaping`), KL, GAE: arrays only
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from segjax import processes
from segjax.config.settings import PPO, Compat, RewardShaping
from segjax.model import sharding
from segjax.model.heads import scores, token_logprobs, values
from segjax.model.llama import LlamaConfig, RowLayout
from segjax.rl import kl
from segjax.rl.advantages import action_starts, gae, macro_gae, returns
from segjax.rl.masked import masked_mean, masked_sum, whiten
from segjax.rl.rewards import shaped_reward
from segjax.train.reward_shaping import dense_rewards
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.types import Experience, Normalizer, Rollout, Segments

_WIDTHS = 256  # tokens; sequences are scored in multiples of it


@dataclasses.dataclass(frozen=True)
class PPORecipe:
  """What is fixed over a PPO run: the networks, how text is cut, how scores become rewards."""

  policy: LlamaConfig
  reference: LlamaConfig
  reward: LlamaConfig | None  # None: rewards come from a function alone
  critic: LlamaConfig
  cutter: Segmenter
  spread: str
  shaping: RewardShaping
  ppo: PPO
  compat: Compat = dataclasses.field(default_factory=Compat)
  recompute_logprob: bool = False


class ModelOutputs(NamedTuple):
  """What the networks say of each response token; see `segjax.types` for the alignment.

  `prompt_score` is the reward model's at the last token of the prompt.
  """

  old_logprob: Float[Array, 'B T']
  ref_logprob: Float[Array, 'B T']
  entropy: Float[Array, 'B T']
  score: Float[Array, 'B T']
  value: Float[Array, 'B T']
  prompt_score: Float[Array, 'B']


def concat_prompt_response(rollout: Rollout) -> Int[Array, 'B S']:
  """Prompt and response as one sequence padded on the right, S = P + T."""
  return _joined(rollout.prompt_ids, rollout.response_ids, rollout.prompt_length)


def attention_segment_ids(rollout: Rollout) -> Int[Array, 'B S'] | None:
  """1 on the tokens of `join` that attention sees and 0 on the others; None for all seen."""
  if rollout.attended is None:
    return None
  prompt = jnp.ones(rollout.prompt_ids.shape, jnp.int32)
  return _joined(prompt, rollout.attended.astype(jnp.int32), rollout.prompt_length)


def _joined(prompt: Array, response: Array, prompt_length: Int[Array, 'B']) -> Array:
  size = prompt.shape[1]
  both = jnp.concatenate([prompt, response], axis=1)
  position = jnp.arange(both.shape[1])[None]
  length = prompt_length[:, None]
  source = jnp.where(position < length, position, position - length + size)
  return jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1)


def gather_response(
  x: Float[Array, 'B S'], prompt_length: Int[Array, 'B'], size: int
) -> Float[Array, 'B T']:
  """The `size` entries of each row that start at its response; past the row's end its last one."""
  index = prompt_length[:, None] + jnp.arange(size)[None]
  return jnp.take_along_axis(x, jnp.minimum(index, x.shape[1] - 1), axis=1)


@functools.partial(jax.jit, static_argnames='recipe')
def score_chunk(
  params: dict[str, Any],
  ids: Int[Array, 'B S'],
  segment_ids: Int[Array, 'B S'] | None,
  rollout: Rollout,
  *,
  recipe: PPORecipe,
) -> ModelOutputs:
  """One forward of reference, reward model and critic (and policy, if log-probs are recomputed).

  Args:
    params: the trees 'policy', 'reference' and, where there are any, 'reward' and 'critic'.
  """

  rows = RowLayout(segment_ids=segment_ids)

  def logprobs(name, config):
    return token_logprobs(params[name], ids, config, rows)

  def window(x):
    return gather_response(x, rollout.prompt_length, rollout.response_ids.shape[1])

  ref_logprob, entropy = logprobs('reference', recipe.reference)
  old_logprob = rollout.old_logprob
  if recipe.recompute_logprob:
    old_logprob = window(logprobs('policy', recipe.policy)[0])
  # Evaluation has no critic, and a run on rules alone no reward model.
  value = score = jnp.zeros(ids.shape, jnp.float32)
  if 'critic' in params:
    value = values(params['critic'], ids, recipe.critic, rows)
  if recipe.reward is not None:
    score = scores(params['reward'], ids, recipe.reward, rows)
  return ModelOutputs(
    old_logprob=jnp.where(rollout.response_mask, old_logprob, 0.0),
    ref_logprob=window(ref_logprob),
    entropy=window(entropy),
    score=window(score),
    value=window(value),
    prompt_score=gather_response(score, rollout.prompt_length - 1, 1)[:, 0],
  )


def score(params: dict[str, Any], rollout: Rollout, *, recipe: PPORecipe) -> ModelOutputs:
  """`score_piece` over the whole rollout, `ppo.scoring_batch_size` sequences at a time, alike in
  length.

  A piece is as wide as its longest sequence needs, in a few widths so that few programs compile.
  """
  params = sharding.to_device(params)  # for as long as this takes, those that wait on the host
  ids, segment_ids = _join_both(rollout)
  total, width = ids.shape
  size = recipe.ppo.scoring_batch_size or total
  length = sequence_lengths(rollout)
  order = np.arange(total) if size == total else np.argsort(length, kind='stable')
  pieces = []
  for rows in order.reshape(-1, size):
    needed = min(-(-int(length[rows].max()) // _WIDTHS) * _WIDTHS, width)
    piece_ids, seen, piece = take_rows((ids, segment_ids, rollout), rows)
    seen = None if seen is None else seen[:, :needed]
    pieces.append(score_chunk(params, piece_ids[:, :needed], seen, piece, recipe=recipe))
  if len(pieces) == 1:
    return pieces[0]
  return take_rows(concatenate(pieces), np.argsort(order))


def sequence_lengths(rollout: Rollout) -> np.ndarray:
  """Tokens of prompt and response, [B], on the host."""
  found = processes.to_host((rollout.prompt_length, jnp.sum(rollout.response_mask, axis=1)))
  return np.add(*found)


@jax.jit
def _join_both(rollout: Rollout) -> tuple[Array, Array | None]:
  return concat_prompt_response(rollout), attention_segment_ids(rollout)


@jax.jit
def concatenate(pieces: list[Any]) -> Any:
  """Pieces of a batch joined along B, still split over the devices."""
  return jax.tree.map(
    lambda *parts: sharding.constrain_batch(jnp.concatenate(parts, axis=0)), *pieces
  )


@jax.jit
def take_rows(tree: Any, rows: Int[Array, 'N']) -> Any:
  """The rows of every array in the tree, split over the devices."""
  return jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), tree)


@functools.partial(jax.jit, static_argnames='recipe')
def make_experience(
  rollout: Rollout,
  scored: ModelOutputs,
  normalizer: Normalizer,
  kl_coef: ScalarLike,
  rule: Float[Array, 'B T'] | None = None,
  *,
  recipe: PPORecipe,
) -> tuple[Experience, dict[str, Array]]:
  """Dense rewards and advantages of a rollout, and what a person wants to know of them.

  reward_t = clamp(dense_t) - kl_coef · kl_t, advantage by GAE, whitened over the whole rollout.
  With ppo.kl_placement=loss the reward has no KL. Metrics are means over responses, explained in
  `report.metric_docs`; `objective/kl` is Σ_t (log π - log π_ref) per response, in nats.

  Args:
    rule: a user's reward per token, if there is one.
  """
  ppo, mask = recipe.ppo, rollout.response_mask
  rollout = dataclasses.replace(rollout, old_logprob=scored.old_logprob)
  ended = rollout.finished | recipe.compat.force_eos
  segments = segment_batch(rollout.response_ids, mask, ended, scored.entropy, recipe.cutter)
  dense = dense_rewards(
    scored.score,
    scored.prompt_score,
    segments,
    rollout,
    normalizer,
    rule,
    shaping=recipe.shaping,
    spread=recipe.spread,
    segmentation=recipe.cutter.segmentation,
    compat=recipe.compat,
  )
  shape = functools.partial(
    shaped_reward,
    kl_coef=kl_coef if ppo.kl_placement == 'reward' else 0.0,
    clip=recipe.shaping.reward_clip,
  )
  token_kl = kl.ESTIMATORS[ppo.kl_estimator](scored.old_logprob, scored.ref_logprob)
  reward = jax.vmap(shape)(dense, token_kl, mask)
  advantage, value_mask = _advantage(reward, scored.value, segments, mask, ppo)
  experience = Experience(
    rollout=rollout,
    ref_logprob=scored.ref_logprob,
    entropy=scored.entropy,
    score=scored.score,
    value=scored.value,
    segments=segments,
    reward=reward,
    advantage=whiten(advantage, mask) if ppo.whiten else advantage,
    return_=returns(advantage, scored.value, value_mask),
    value_mask=value_mask,
  )
  penalty = kl_coef * token_kl if ppo.kl_placement == 'reward' else jnp.zeros_like(token_kl)
  return experience, _metrics(experience, dense, penalty)


def _advantage(reward, value, segments: Segments, mask, ppo: PPO):
  """Advantages, and the states whose value the critic learns."""
  constants = {'gamma': ppo.gamma, 'gae_lambda': ppo.gae_lambda}
  if ppo.gae_level == 'token':
    return jax.vmap(functools.partial(gae, **constants))(reward, value, mask), mask
  starts = jax.vmap(action_starts)(segments, mask)
  return jax.vmap(functools.partial(macro_gae, **constants))(reward, value, starts, mask), starts


def _metrics(
  experience: Experience, dense: Float[Array, 'B T'], penalty: Float[Array, 'B T']
) -> dict[str, Array]:
  rollout, mask = experience.rollout, experience.rollout.response_mask
  segments = experience.segments
  difference = rollout.old_logprob - experience.ref_logprob

  def of_a_response(x):
    return jnp.mean(masked_sum(x, mask, axis=1))

  length = _count(mask)
  return {
    'objective/reward': of_a_response(dense),
    'objective/rlhf_reward': of_a_response(experience.reward),
    'objective/non_score_reward': -of_a_response(penalty),
    'objective/scores': masked_mean(experience.score, segments.end),
    'objective/kl': of_a_response(difference),
    'objective/kl_token_max': jnp.max(jnp.where(mask, jnp.abs(difference), 0.0)),
    'objective/entropy': -masked_mean(rollout.old_logprob, mask),
    'objective/ref_entropy': masked_mean(experience.entropy, mask),
    'reward/token_abs_max': jnp.max(jnp.where(mask, jnp.abs(dense), 0.0)),
    'reward/segment_mean': masked_sum(dense, mask) / jnp.maximum(jnp.sum(segments.end), 1),
    **_by_position(dense, segments),
    'response/length_mean': jnp.mean(length),
    'response/length_max': jnp.max(length),
    'response/eos_rate': jnp.mean(rollout.finished.astype(jnp.float32)),
    'segments/per_response': jnp.mean(segments.num_segments.astype(jnp.float32)),
    'segments/length_mean': _segment_length(segments),
    **_sampling_gap(rollout),
    'critic/explained_variance': _explained_variance(
      experience.value, experience.return_, experience.value_mask
    ),
  }


def _by_position(dense: Float[Array, 'B T'], segments: Segments) -> dict[str, Array]:
  """Mean reward of a segment by tenth of its relative position p = (segment_id + 1) / num_segments.

  The k-th holds p in ((k - 1) / 10, k / 10]; NaN where no segment lies there.
  """
  last = jnp.maximum(segments.num_segments, 1)[:, None]
  # In integers, ceil(10 p) exactly: as floats 3 / 10 and 0.3 may differ.
  tenth = -(-10 * (segments.segment_id + 1) // last)
  inside = segments.segment_id >= 0
  found = {}
  for k in range(1, 11):
    here = inside & (tenth == k)
    number = jnp.sum(here & segments.end)
    mean = jnp.sum(jnp.where(here, dense, 0)) / jnp.maximum(number, 1)
    found[f'reward/by_position/{k}'] = jnp.where(number, mean, jnp.nan)
  return found


@functools.partial(jax.jit, static_argnames='ppo')
def within_bounds(metrics: dict[str, Array], ppo: PPO) -> Bool[Array, '']:
  """Whether a rollout may be learned from: finite, and within ppo.skip_if_kl_above and
  ppo.skip_if_reward_above.
  """
  sound = jnp.bool(True)
  for name, most in (
    ('objective/kl', ppo.skip_if_kl_above),
    ('reward/token_abs_max', ppo.skip_if_reward_above),
  ):
    sound &= jnp.isfinite(metrics[name]) & (jnp.abs(metrics[name]) <= (most or jnp.inf))
  return sound


def _sampling_gap(rollout: Rollout) -> dict[str, Array]:
  """|log-prob as drawn - log-prob at temperature 1, unfiltered| per token; 0 for plain sampling."""
  if rollout.sample_logprob is None:
    return {}
  mask = rollout.response_mask
  gap = jnp.where(mask, jnp.abs(rollout.sample_logprob - rollout.old_logprob), 0.0)
  return {
    'rollout/logprob_mismatch': masked_mean(gap, mask),
    'rollout/logprob_mismatch_max': jnp.max(gap),
  }


def _count(mask: Bool[Array, 'B T']) -> Float[Array, 'B']:
  return jnp.sum(mask, axis=1).astype(jnp.float32)


def _segment_length(segments: Segments) -> Float[Array, '']:
  """Tokens per segment, over the whole rollout."""
  return jnp.sum(segments.segment_id >= 0) / jnp.maximum(jnp.sum(segments.num_segments), 1)


def _explained_variance(value, return_, mask):
  """1 - Var(return - value) / Var(return) where the critic learns."""

  def variance(x):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

  return 1 - variance(return_ - value) / jnp.maximum(variance(return_), 1e-8)
