"""Forward passes of the frozen networks and the critic over a rollout.

Rewards and advantages are computed from their outputs by `train.experience`.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax import processes
from segjax.model import host_memory, sharding
from segjax.model.attribution import ATTRIBUTIONS
from segjax.model.heads import (
  read_logprobs,
  read_scores,
  read_values,
  shared_hidden_states,
  token_logprobs,
)
from segjax.model.llama import RowLayout
from segjax.train.recipe import PPORecipe
from segjax.types import Rollout

_SMALLEST_STEP = 128  # tokens, between the widths of chunks


class ModelOutputs(NamedTuple):
  """Outputs of all networks at each response token; `segjax.types` defines the alignment.

  Attributes:
    ref_entropy: entropy of the reference, nats.
    score: the reward model's raw output.
    value: the critic's; None without a critic.
    prompt_score: the reward model's output at the last token of the prompt.
    lm_logprob: log-prob under the language model that rewards; None without one.
    attribution: what each token contributes to the score of the response, where
      reward_shaping.redistribute needs it.
    scores: raw scores of the reward models of config.rewards, by name; None without any.
  """

  old_logprob: Float[Array, 'B T']
  ref_logprob: Float[Array, 'B T']
  ref_entropy: Float[Array, 'B T']
  score: Float[Array, 'B T']
  value: Float[Array, 'B T'] | None
  prompt_score: Float[Array, 'B']
  lm_logprob: Float[Array, 'B T'] | None = None
  attribution: Float[Array, 'B T'] | None = None
  scores: dict[str, Float[Array, 'B T']] | None = None


def concat_prompt_response(rollout: Rollout) -> Int[Array, 'B S']:
  """Returns prompt and response as one sequence padded on the right, S = P + T."""
  return _concat(rollout.prompt_ids, rollout.response_ids, rollout.prompt_length)


def attention_segment_ids(rollout: Rollout) -> Int[Array, 'B S'] | None:
  """Returns 1 for the tokens of `concat_prompt_response` that attention sees, else 0.

  None where attention sees all tokens.
  """
  if rollout.attended is None:
    return None
  prompt = jnp.ones(rollout.prompt_ids.shape, jnp.int32)
  return _concat(prompt, rollout.attended.astype(jnp.int32), rollout.prompt_length)


def carried_mask(rollout: Rollout) -> Bool[Array, 'B T']:
  """Returns True on the tokens that earlier policies drew; `rollout.carried` must not be None."""
  return jnp.arange(rollout.response_mask.shape[1])[None] < rollout.carried[:, None]


def _concat(prompt: Array, response: Array, prompt_length: Int[Array, 'B']) -> Array:
  size = prompt.shape[1]
  both = jnp.concatenate([prompt, response], axis=1)
  position = jnp.arange(both.shape[1])[None]
  length = prompt_length[:, None]
  # The response follows the prompt's last real token, so the prompt's padding moves to the end.
  source = jnp.where(position < length, position, position - length + size)
  # Positions past the response read its padding; no mask includes them.
  return jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1)


def gather_response(
  x: Float[Array, 'B S'], prompt_length: Int[Array, 'B'], size: int
) -> Float[Array, 'B T']:
  """Returns the `size` entries of each row from its response's first on.

  Indices past the end of a row read its last entry.
  """
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
  """Runs one forward pass of each network, or of each group of one base, over the rollout.

  Args:
    params: `recipe.own_params` of 'policy', 'reference' and, where present, 'reward', 'reward_lm',
      'critic' and those of `recipe.rewards`. The policy is run only with `recompute_logprob`.
    ids: `concat_prompt_response` of the rollout.
    segment_ids: `attention_segment_ids` of the rollout.
    rollout: the rows to score.
    recipe: the networks.
  """

  layout = RowLayout(segment_ids=segment_ids)
  configs = {name: recipe.network(name) for name in _run_networks(recipe)}
  params, hidden = {name: recipe.with_base(name, params) for name in configs}, {}
  for names in recipe.groups(configs):
    networks = [(params[name], configs[name]) for name in names]
    hidden |= zip(names, shared_hidden_states(networks, ids, layout), strict=True)

  def logprobs(name):
    return read_logprobs(hidden[name], params[name], ids, configs[name], layout)

  def window(x):
    return gather_response(x, rollout.prompt_length, rollout.response_ids.shape[1])

  ref_logprob, ref_entropy = logprobs('reference')
  old_logprob = rollout.old_logprob
  if 'policy' in configs:
    old_logprob = window(logprobs('policy')[0])
    # The present policy would give tokens that earlier ones drew another log-prob.
    if rollout.carried is not None:
      old_logprob = jnp.where(carried_mask(rollout), rollout.old_logprob, old_logprob)
  score, value = jnp.zeros(ids.shape, jnp.float32), None
  if 'critic' in configs:
    value = window(read_values(hidden['critic'], params['critic'], layout))
  attribution = None
  if 'reward' in configs:
    score = read_scores(hidden['reward'], params['reward'])
    if attribute := ATTRIBUTIONS.get(recipe.shaping.redistribute):
      last = rollout.prompt_length + jnp.sum(rollout.response_mask, axis=1) - 1
      attribution = window(attribute(params['reward'], ids, last, configs['reward']))
  return ModelOutputs(
    old_logprob=jnp.where(rollout.response_mask, old_logprob, 0.0),  # as in a rollout
    ref_logprob=window(ref_logprob),
    ref_entropy=window(ref_entropy),
    score=window(score),
    value=value,
    prompt_score=gather_response(score, rollout.prompt_length - 1, 1)[:, 0],
    lm_logprob=window(logprobs('reward_lm')[0]) if 'reward_lm' in configs else None,
    attribution=attribution,
    scores=jax.tree.map(window, _listed_scores(hidden, params, recipe)),
  )


def _listed_scores(
  hidden: dict[str, Array], params: dict[str, Any], recipe: PPORecipe
) -> dict[str, Float[Array, 'B S']] | None:
  """Returns the scores of `recipe.rewards` that read tokens, by name; None if there are none."""
  scores = {
    source.name: read_scores(hidden[source.key], params[source.key])
    for source in recipe.rewards
    if not source.reads_text
  }
  return scores or None


def _run_networks(recipe: PPORecipe) -> list[str]:
  """Returns the networks that `score_chunk` runs."""
  is_run = {
    'reference': True,
    # In bfloat16 the decode loop rounds differently from this forward pass: the first ratio of the
    # update would not be 1, and the KL not 0, before anything is learned.
    'policy': recipe.recompute_logprob,
    'critic': recipe.critic is not None,
    'reward': recipe.reward is not None,
    'reward_lm': recipe.reward_lm is not None,
    **{source.key: not source.reads_text for source in recipe.rewards},
  }
  return [name for name, value in is_run.items() if value]


def score(
  params: dict[str, Any], rollout: Rollout, length: Int[np.ndarray, 'B'], *, recipe: PPORecipe
) -> ModelOutputs:
  """Runs `score_chunk` over the rollout, `ppo.scoring_batch_size` sequences at a time.

  Sequences of similar length share a chunk, which is as wide as its longest one needs, rounded up
  so that few programs are compiled.

  Args:
    params: parameters by name; those in host memory are on the devices during the call only.
    rollout: the responses.
    length: tokens of prompt and response together.
    recipe: the networks.
  """
  params = recipe.own_params(params)
  names = {'reference', *_run_networks(recipe)} & params.keys()
  params = host_memory.to_device({name: params[name] for name in names})  # once for all chunks
  order, chunks = [], []
  for rows, chunk in _chunks(rollout, length, recipe):
    order.append(rows)
    chunks.append(score_chunk(params, *chunk, recipe=recipe))
  if len(chunks) == 1:
    return chunks[0]
  # The inverse of a permutation is its argsort: rows return to their original order.
  return take_rows(concatenate(chunks), np.argsort(np.concatenate(order)))


def policy_logprobs(
  params: Any, rollout: Rollout, length: Int[np.ndarray, 'B'], *, recipe: PPORecipe
) -> Float[np.ndarray, 'B T']:
  """Returns log-probs of responses by full forward passes of the policy, on the host.

  Args:
    params: parameters of the policy.
    rollout: the responses.
    length: tokens of prompt and response together; 0 in rows whose log-probs are not needed.
    recipe: see `score`.
  """
  logprob = np.zeros(rollout.response_mask.shape, np.float32)
  for rows, chunk in _chunks(rollout, length, recipe):
    logprob[rows] = processes.to_host(_policy_chunk(params, *chunk, recipe=recipe))
  return logprob


@functools.partial(jax.jit, static_argnames='recipe')
def _policy_chunk(
  params: Any,
  ids: Int[Array, 'B S'],
  segment_ids: Int[Array, 'B S'] | None,
  rollout: Rollout,
  *,
  recipe: PPORecipe,
) -> Float[Array, 'B T']:
  logprob, _ = token_logprobs(params, ids, recipe.policy, RowLayout(segment_ids=segment_ids))
  return gather_response(logprob, rollout.prompt_length, rollout.response_ids.shape[1])


def _chunks(
  rollout: Rollout, length: Int[np.ndarray, 'B'], recipe: PPORecipe
) -> Iterator[tuple[np.ndarray, tuple[Array, Array | None, Rollout]]]:
  """Yields (rows, their token ids, segment ids and arrays) of each of `chunk_rows`."""
  ids, segment_ids = _concat_both(rollout)
  for rows, needed in chunk_rows(length, recipe.ppo.scoring_batch_size, ids.shape[1]):
    chunk_ids, chunk_segments, chunk = take_rows((ids, segment_ids, rollout), rows)
    if chunk_segments is not None:
      chunk_segments = chunk_segments[:, :needed]
    yield rows, (chunk_ids[:, :needed], chunk_segments, chunk)


def chunk_rows(
  length: Int[np.ndarray, 'B'], size: int, width: int
) -> Iterator[tuple[Int[np.ndarray, 'N'], int]]:
  """Yields (rows, their width) of the chunks in which a rollout is scored.

  A chunk is as wide as its longest row needs; chunks of rows without tokens are left out.

  Args:
    length: tokens of prompt and response together. They are known on the host: reading them from a
      device would wait for all work before.
    size: rows of a chunk; 0 for all.
    width: of the longest row that there may be.
  """
  size = size or len(length)
  order = np.arange(len(length)) if size == len(length) else np.argsort(length, kind='stable')
  for rows in order.reshape(-1, size):
    if longest := int(length[rows].max()):
      # Four widths from one power of two to the next: few programs, and little padding.
      step = max(_SMALLEST_STEP, 1 << longest.bit_length() - 3)
      yield rows, min(-(-longest // step) * step, width)


@jax.jit
def _concat_both(rollout: Rollout) -> tuple[Array, Array | None]:
  return concat_prompt_response(rollout), attention_segment_ids(rollout)


@jax.jit
def concatenate(chunks: list[Any]) -> Any:
  """Joins chunks of a batch along B; the result stays split over the devices."""
  return jax.tree.map(
    lambda *parts: sharding.constrain_batch(jnp.concatenate(parts, axis=0)), *chunks
  )


@jax.jit
def take_rows(tree: Any, rows: Int[Array, 'N']) -> Any:
  """Returns these rows of every array in the tree, split over the devices."""
  # Without the constraint, indexing by traced rows may leave all rows on every device.
  return jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), tree)
