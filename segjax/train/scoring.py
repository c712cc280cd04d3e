"""One forward pass of the frozen networks and the critic over responses.

`train.rollout_scoring` says which rows go through it together; rewards and advantages are computed
from its outputs by `train.experience`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from segjax.model.attribution import ATTRIBUTIONS
from segjax.model.heads import (
  read_logprobs,
  read_scores,
  read_values,
  shared_hidden_states,
)
from segjax.model.llama import RowLayout
from segjax.model.packed import pack, unpack
from segjax.train.recipe import PPORecipe
from segjax.train.rollout_rows import carried_mask, gather_response
from segjax.types import PackingSlots, Rollout


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


@functools.partial(jax.jit, static_argnames='recipe')
def score_chunk(
  params: dict[str, Any],
  ids: Int[Array, 'B S'],
  segment_ids: Int[Array, 'B S'] | None,
  rollout: Rollout,
  slots: PackingSlots | None = None,
  *,
  recipe: PPORecipe,
) -> ModelOutputs:
  """Runs one forward pass of each network, or of each group of one base, over the rollout.

  Args:
    params: `recipe.own_params` of 'policy', 'reference' and, where present, 'reward', 'reward_lm',
      'critic' and those of `recipe.rewards`. The policy is run only with `recompute_logprob`.
    ids: `concat_prompt_response` of the rollout.
    segment_ids: `attention_segment_ids` of the rollout; None with `slots`.
    rollout: the rows to score.
    slots: where each row goes in packed rows; None leaves each in its own.
    recipe: the networks.
  """
  size, layout = ids.shape[1], RowLayout(segment_ids=segment_ids)
  if slots is not None:
    ids, layout = pack(ids, slots)
  params, hidden = _run(params, ids, layout, recipe)

  def logprobs(name):
    return read_logprobs(hidden[name], params[name], ids, recipe.network(name), layout)

  def by_sequence(x):
    return x if slots is None else unpack(x, slots, size)

  def window(x):
    return gather_response(by_sequence(x), rollout.prompt_length, rollout.response_ids.shape[1])

  ref_logprob, ref_entropy = logprobs('reference')
  recomputed = window(logprobs('policy')[0]) if 'policy' in hidden else None
  score, value = jnp.zeros(ids.shape, jnp.float32), None
  if 'critic' in hidden:
    value = window(read_values(hidden['critic'], params['critic'], layout))
  attribution = None
  if 'reward' in hidden:
    score = read_scores(hidden['reward'], params['reward'])
    if attribute := ATTRIBUTIONS.get(recipe.shaping.redistribute):
      last = rollout.prompt_length + jnp.sum(rollout.response_mask, axis=1) - 1
      attribution = window(attribute(params['reward'], ids, last, recipe.reward))
  return ModelOutputs(
    old_logprob=_old_logprob(rollout, recomputed),
    ref_logprob=window(ref_logprob),
    ref_entropy=window(ref_entropy),
    score=window(score),
    value=value,
    prompt_score=gather_response(by_sequence(score), rollout.prompt_length - 1, 1)[:, 0],
    lm_logprob=window(logprobs('reward_lm')[0]) if 'reward_lm' in hidden else None,
    attribution=attribution,
    scores=jax.tree.map(window, _listed_scores(hidden, params, recipe)),
  )


def _old_logprob(rollout: Rollout, recomputed: Float[Array, 'B T'] | None) -> Float[Array, 'B T']:
  """Returns the log-probs of the policies that drew the tokens, 0 beyond the responses."""
  logprob = rollout.old_logprob if recomputed is None else recomputed
  # The present policy would give tokens that earlier ones drew another log-prob.
  if recomputed is not None and rollout.carried is not None:
    logprob = jnp.where(carried_mask(rollout), rollout.old_logprob, logprob)
  return jnp.where(rollout.response_mask, logprob, 0.0)


def _run(
  params: dict[str, Any], ids: Int[Array, 'R W'], layout: RowLayout, recipe: PPORecipe
) -> tuple[dict[str, Any], dict[str, Float[Array, 'R W D']]]:
  """Returns (parameters, hidden states) of the networks by name."""
  configs = {name: recipe.network(name) for name in run_networks(recipe)}
  params, hidden = {name: recipe.with_base(name, params) for name in configs}, {}
  for names in recipe.groups(configs):
    networks = [(params[name], configs[name]) for name in names]
    hidden |= zip(names, shared_hidden_states(networks, ids, layout), strict=True)
  return params, hidden


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


def run_networks(recipe: PPORecipe) -> list[str]:
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
