"""Importance weights make up for a policy that draws with rounded weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from jax.flatten_util import ravel_pytree

from segjax.model import quantized
from segjax.train.ppo_step import policy_objective
from segjax.types import Experience, Rollout, Segments


@pytest.mark.campaign
def test_weights_recover_the_gradient_of_the_policy():
  """The mean over all tokens that int8 weights may draw is that over those of the policy.

  One row for each token of the vocabulary: a row's advantage is multiplied by the number of rows
  and by the token's probability, so that the mean of the rows is the expectation.
  """
  params = models.params(models.CONFIG)
  prompt = models.ids(seed=5, shape=(1, training.PROMPT))

  def next_logprob(params):
    return jax.nn.log_softmax(models.logits(params, prompt, models.CONFIG)[0, -1])

  old, drawn = next_logprob(params), next_logprob(quantized.quantize_layers(params))
  advantage = np.random.default_rng(6).normal(size=models.VOCAB).astype(np.float32)

  ppo = dataclasses.replace(training.PPO_SETTINGS, importance_clip=100.0)
  objective = functools.partial(policy_objective, recipe=training.recipe(ppo=ppo))
  gradient = jax.jit(jax.grad(objective, has_aux=True))

  def mean_gradient(distribution, sample_logprob):
    weighted = models.VOCAB * jnp.exp(distribution) * advantage
    batch = _experience(prompt, old, sample_logprob, weighted)
    tree, _ = gradient(params, batch, jnp.float32(models.VOCAB), 0.0)
    return np.asarray(ravel_pytree(tree)[0])

  expected = mean_gradient(old, old)
  size = np.linalg.norm(expected)
  assert np.linalg.norm(mean_gradient(drawn, drawn) - expected) < 1e-5 * size
  # All weights are 1: as without importance_clip.
  assert np.linalg.norm(mean_gradient(drawn, old) - expected) > 1e-2 * size


def _experience(prompt, old_logprob, sample_logprob, advantage):
  """Returns experience of one-token responses to the prompt, one for each token."""
  rows = models.VOCAB
  column, real = jnp.zeros((rows, 1)), jnp.ones((rows, 1), bool)
  rollout = Rollout(
    prompt_ids=jnp.repeat(prompt, rows, axis=0),
    prompt_length=jnp.full(rows, prompt.shape[1], jnp.int32),
    response_ids=jnp.arange(rows, dtype=jnp.int32)[:, None],
    response_mask=real,
    finished=real[:, 0],
    old_logprob=old_logprob[:, None],
    sample_logprob=sample_logprob[:, None],
  )
  others = dict.fromkeys(('ref_logprob', 'ref_entropy', 'score', 'value', 'reward'), column)
  segments = Segments(real, real, jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32))
  return Experience(
    rollout=rollout,
    segments=segments,
    advantage=advantage[:, None],
    return_=column,
    value_mask=real,
    **others,
  )
