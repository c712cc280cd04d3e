"""The work of a step in tokens and model FLOPs."""

import dataclasses

import numpy as np
import pytest
from fixtures import adapters, training

from segjax.model.flops import forward_flops
from segjax.train import throughput

LENGTHS = np.array([3, 5])
RECIPE = training.recipe(ppo=dataclasses.replace(training.PPO_SETTINGS, num_ppo_epochs=2))


def _forward(head):
  return forward_flops(RECIPE.policy, 8.0, 6.0 + 15.0, head)


@pytest.mark.parametrize(
  'recompute, is_trained, policy_passes',
  [(False, True, 1 + 2 * 3), (True, True, 2 + 2 * 3), (False, False, 1), (True, False, 2)],
)
def test_a_step_of_ppo_counts_the_passes_that_it_computes(recompute, is_trained, policy_passes):
  recipe = dataclasses.replace(RECIPE, recompute_logprob=recompute)
  work = throughput.ppo_step(recipe, LENGTHS, policy_is_trained=is_trained)
  language, scalar = policy_passes + 1, 1 + 2 * 3 + 1  # with reference; critic and reward model
  assert work['perf/tokens'] == 8
  assert work['perf/flops'] == language * _forward('language') + scalar * _forward('scalar')


def test_a_step_without_a_critic_counts_none():
  both = (
    throughput.ppo_step(recipe, LENGTHS, policy_is_trained=True)['perf/flops']
    for recipe in (RECIPE, dataclasses.replace(RECIPE, critic=None))
  )
  assert next(both) - next(both) == (1 + 2 * 3) * _forward('scalar')


@pytest.mark.parametrize('trains_head', [False, True])
def test_gradients_of_frozen_matrices_are_not_computed(trains_head):
  config = adapters.config(adapters.HEADED if trains_head else adapters.ALL)
  work = throughput.update(LENGTHS, config, 'language')
  head = 2 * 8.0 * config.hidden_size * config.vocab_size
  attention = forward_flops(config, 0, 6.0 + 15.0, 'none')
  assert work['perf/flops'] == 2 * _forward('language') + attention + trains_head * head


def test_an_update_counts_three_passes_and_the_reference():
  work = throughput.update(LENGTHS, RECIPE.reward, 'scalar', RECIPE.reference)
  assert work['perf/flops'] == 3 * _forward('scalar') + _forward('language')
