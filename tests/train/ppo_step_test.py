"""The PPO update on minibatches of a rollout of the small network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.compiles import compiled

from segjax.config.settings import Compat
from segjax.rl.losses import num_terms
from segjax.train.compat import apply_rollout_compat
from segjax.train.experience import make_experience
from segjax.train.metrics import Metrics, combine_updates
from segjax.train.ppo_step import Minibatch, policy_objective, ppo_step
from segjax.train.rollout import CollectedRollout
from segjax.train.rollout_rows import take_rows
from segjax.train.rollout_scoring import score
from segjax.types import Normalizer

ROWS = np.array([[6, 0, 5, 3], [7, 1, 2, 4], [0, 1, 2, 3]])
RECIPE = training.recipe()
KL_COEF = np.float32(0.1)


@functools.cache
def scored(recompute_logprob):
  """Returns (recipe, experience of a rollout, metrics of the rollout)."""
  mesh, recipe = models.mesh(1), training.recipe(recompute_logprob=recompute_logprob)
  params = {name: training.network(name, mesh) for name in training.SEEDS}
  rollout = training.sample(params['policy'])
  experience, metrics = make_experience(
    rollout.arrays,
    score(params, rollout.arrays, rollout.length, recipe=recipe),
    jax.tree.map(jnp.float32, Normalizer()),
    KL_COEF,
    recipe=recipe,
  )
  return recipe, experience, jax.device_get(metrics)


@pytest.fixture(
  params=[pytest.param(False, marks=pytest.mark.campaign), True],
  ids=['decode_logprob', 'recomputed'],
)
def scored_rollout(request):
  return scored(request.param)


@pytest.fixture
def decode_logprob_rollout():
  """A scored rollout with the log-probs of the decode loop."""
  return scored(False)


def step(states, experience, rows, recipe=RECIPE, **values):
  states, metrics = ppo_step(
    dict(zip(('policy', 'critic'), states, strict=True)),
    {},
    Minibatch(experience, rows),
    KL_COEF,
    recipe=recipe,
    total_steps=training.TOTAL,
    **values,
  )
  return list(states.values()), jax.device_get(metrics.flat())


def host_part(rollout):
  """Returns the rollout with its arrays on the host."""
  host = training.copied(rollout)
  length = host.prompt_length + host.response_mask.sum(axis=1)
  return CollectedRollout(rollout, host.response_ids, host.response_mask, host.finished, length)


def initial_states():
  return [training.state('policy'), training.state('critic')]


def test_first_minibatch_is_on_policy(scored_rollout):
  """Before any update the policy equals the one that sampled, and the reference."""
  recipe, experience, rollout_metrics = scored_rollout
  _, metrics = step(initial_states(), experience, ROWS[0])
  # float32: the decode loop sums in another order than the full forward pass. Recomputed log-probs
  # come from the same forward pass, with another number of rows in its matrix products.
  limit = 1e-6 if recipe.recompute_logprob else 1e-4
  assert metrics['policy/ratio_max_deviation'] <= limit
  assert rollout_metrics['objective/kl_token_max'] <= limit
  assert metrics['policy/clipfrac'] == 0
  assert metrics['policy/ratio_mean'] == pytest.approx(1, abs=limit)
  assert metrics['skipped_updates'] == 0


@pytest.mark.campaign
def test_tokens_of_earlier_policies_keep_their_log_probs():
  """Their ratio is not 1, and is not part of the deviation of sampling from training."""
  mesh, recipe = models.mesh(1), training.recipe(recompute_logprob=True)
  params = {name: training.network(name, mesh) for name in training.SEEDS}
  rollout = training.sample(params['policy'])
  carried = np.minimum(rollout.response_mask.sum(axis=1), 3).astype(np.int32)
  is_older = np.arange(training.RESPONSE) < carried[:, None]
  drawn = np.where(is_older, rollout.arrays.old_logprob - 0.5, rollout.arrays.old_logprob)
  arrays = dataclasses.replace(rollout.arrays, old_logprob=jnp.asarray(drawn))
  arrays = dataclasses.replace(arrays, carried=jnp.asarray(carried))
  outputs = score(params, arrays, rollout.length, recipe=recipe)
  np.testing.assert_array_equal(outputs.old_logprob[is_older], drawn[is_older])
  np.testing.assert_allclose(outputs.old_logprob[~is_older], drawn[~is_older], atol=1e-4)
  assert (np.asarray(outputs.old_logprob) != drawn)[~is_older].any()  # recomputed
  normalizer = jax.tree.map(jnp.float32, Normalizer())
  experience, _ = make_experience(arrays, outputs, normalizer, KL_COEF, recipe=recipe)
  _, metrics = step(initial_states(), experience, ROWS[0])
  assert metrics['policy/own_ratio_max_deviation'] < 1e-4
  assert metrics['policy/ratio_max_deviation'] == pytest.approx(np.expm1(0.5), abs=1e-3)


def test_later_minibatches_are_off_policy(scored_rollout, caplog):
  _, experience, _ = scored_rollout
  states, deviation = initial_states(), []
  with compiled(caplog) as names:
    for rows in ROWS:
      states, metrics = step(states, experience, rows)
      deviation.append(metrics['policy/ratio_max_deviation'])
  assert max(names.count(name) for name in ('policy_step', 'critic_step')) <= 1
  assert deviation[0] < 1e-3 < min(deviation[1:])
  assert [int(state.step) for state in states] == [3, 3]


def test_policy_follows_the_advantages(scored_rollout):
  """After a step on the same rows the surrogate is better and the values are nearer."""
  _, experience, _ = scored_rollout
  states, before = step(initial_states(), experience, ROWS[0])
  _, after = step(states, experience, ROWS[0])
  assert after['policy/loss'] < before['policy/loss'] - 1e-3
  assert after['critic/loss'] < before['critic/loss']


def test_loss_is_that_of_the_rows(scored_rollout):
  """The loss of a step is the objective of its rows alone."""
  recipe, experience, _ = scored_rollout
  _, metrics = step(initial_states(), experience, ROWS[0])
  rows = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[ROWS[0]]), experience)
  count = num_terms(rows.rollout.response_mask)
  objective = jax.jit(policy_objective, static_argnames='recipe')
  loss, _ = objective(models.params(models.CONFIG), rows, count, KL_COEF, recipe=recipe)
  assert metrics['policy/loss'] == pytest.approx(float(loss), abs=1e-5)  # float32, near 0


def test_non_finite_critic_does_not_stop_the_policy(scored_rollout):
  _, experience, _ = scored_rollout
  states = initial_states()
  head = states[1].params['scalar_head']
  head['kernel'] = head['kernel'].at[0].set(np.nan)
  before = training.copied(states[1])
  states, metrics = step(states, experience, ROWS[0])
  assert metrics['skipped_updates'] == 1
  assert [int(state.step) for state in states] == [1, 0]
  jax.tree.map(np.testing.assert_array_equal, training.copied(states[1]), before)


def test_states_are_donated(scored_rollout):
  _, experience, _ = scored_rollout
  states = initial_states()
  leaves = jax.tree.leaves(states)
  step(states, experience, ROWS[0])
  assert all(leaf.is_deleted() for leaf in leaves)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(experience))


def variant(**values):
  return training.recipe(ppo=dataclasses.replace(training.PPO_SETTINGS, **values))


@pytest.mark.campaign
def test_micro_batches_add_up_to_the_minibatch(decode_logprob_rollout):
  """Each micro-batch has rows of different lengths; both ways make one update."""
  _, experience, _ = decode_logprob_rollout
  _, metrics = step(initial_states(), experience, ROWS[0])
  _, added = step(initial_states(), experience, ROWS[0], variant(micro_batch_size=2))
  for key in ('policy/loss', 'critic/loss', 'policy/entropy', 'policy/ratio_max_deviation'):
    assert added[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5)  # float32
  for key in ('policy/grad_norm', 'critic/grad_norm'):
    assert added[key] == pytest.approx(metrics[key], rel=1e-5)


@pytest.mark.campaign
def test_kl_in_the_loss_pulls_towards_the_reference(decode_logprob_rollout):
  """Without advantages the penalty alone moves the policy."""
  _, experience, _ = decode_logprob_rollout
  far = dataclasses.replace(
    experience,
    advantage=jnp.zeros_like(experience.advantage),
    ref_logprob=experience.ref_logprob - 1.0,
  )
  recipe = variant(kl_placement='loss', kl_estimator='k2')
  states, before = step(initial_states(), far, ROWS[0], recipe)
  assert before['policy/kl'] == pytest.approx(0.5, rel=1e-3)  # half the square of 1 nat
  assert before['policy/loss'] == pytest.approx(0.1 * 0.5, rel=1e-3)
  _, after = step(states, far, ROWS[0], recipe)
  assert after['policy/kl'] < before['policy/kl']


@pytest.mark.campaign
def test_entropy_bonus_is_in_the_loss(decode_logprob_rollout):
  _, experience, _ = decode_logprob_rollout
  _, without_bonus = step(initial_states(), experience, ROWS[0])
  _, with_bonus = step(initial_states(), experience, ROWS[0], variant(entropy_coef=0.5))
  expected = without_bonus['policy/loss'] - 0.5 * without_bonus['policy/entropy']
  assert with_bonus['policy/loss'] == pytest.approx(expected, abs=1e-5)


def test_importance_weights_scale_the_loss(decode_logprob_rollout):
  """Tokens drawn with half the probability of the policy count twice, or up to the clip."""
  _, experience, _ = decode_logprob_rollout
  rows = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[ROWS[0]]), experience)
  rollout = rows.rollout
  drawn = dataclasses.replace(rollout, sample_logprob=rollout.old_logprob - np.log(2))
  rows, count = dataclasses.replace(rows, rollout=drawn), num_terms(rollout.response_mask)
  losses = []
  for recipe in (RECIPE, variant(importance_clip=1.5)):
    objective = jax.jit(functools.partial(policy_objective, recipe=recipe))
    loss, metrics = objective(models.params(models.CONFIG), rows, count, KL_COEF)
    losses.append(float(loss))
    assert ('importance_mean' in metrics.mean) == (recipe is not RECIPE)
  assert losses[1] == pytest.approx(1.5 * losses[0], abs=1e-6)
  assert metrics.mean['importance_mean'] == pytest.approx(1.5)
  assert metrics.mean['importance_clipfrac'] == 1


def test_critic_learns_alone_in_the_warm_up(decode_logprob_rollout):
  _, experience, _ = decode_logprob_rollout
  states, metrics = step(initial_states(), experience, ROWS[0], policy_from=None)
  assert [int(state.step) for state in states] == [0, 1]
  assert not any(key.startswith('policy/') for key in metrics)
  jax.tree.map(
    np.testing.assert_array_equal, training.copied(states[0]), training.copied(initial_states()[0])
  )


@pytest.mark.campaign
def test_reproduced_attention_mask_keeps_the_ratio_at_1():
  """Both log-probs are computed with the published mask."""
  recipe, experience, _ = scored(True)
  mesh = models.mesh(1)
  params = {name: training.network(name, mesh) for name in training.SEEDS}
  # The shortest response first: its length limits attention in the others.
  shortest_first = np.argsort(np.asarray(experience.rollout.response_mask).sum(axis=1))
  experience = take_rows(experience, shortest_first)
  published = Compat(first_row_attention_mask=True, force_eos=True, micro_batch_size=8)
  host_rollout = host_part(experience.rollout)
  host_rollout = apply_rollout_compat(host_rollout, models.STOP_IDS[0], published, mesh)
  rollout = host_rollout.arrays
  longer = np.asarray(rollout.response_mask & ~rollout.attended)
  assert longer.any()
  outputs = score(params, rollout, host_rollout.length, recipe=recipe)
  assert np.abs(np.asarray(outputs.score - experience.score))[longer].max() > 1e-3
  masked, metrics = make_experience(
    rollout, outputs, jax.tree.map(jnp.float32, Normalizer()), KL_COEF, recipe=recipe
  )
  assert metrics['objective/kl_token_max'] <= 1e-5
  _, metrics = step(initial_states(), masked, ROWS[0])
  assert metrics['policy/ratio_max_deviation'] <= 1e-5


@pytest.mark.campaign
def test_macro_actions_train_the_critic_at_their_starts(decode_logprob_rollout):
  recipe, experience, _ = decode_logprob_rollout
  recipe = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, gae_level='segment'))
  mesh = models.mesh(1)
  params = {name: training.network(name, mesh) for name in training.SEEDS}
  macro, _ = make_experience(
    experience.rollout,
    score(params, experience.rollout, host_part(experience.rollout).length, recipe=recipe),
    jax.tree.map(jnp.float32, Normalizer()),
    KL_COEF,
    recipe=recipe,
  )
  macro = training.copied(macro)
  starts, mask = macro.value_mask, macro.rollout.response_mask
  assert starts.sum() < mask.sum()
  assert np.array_equal(starts & (macro.segments.segment_id >= 0), macro.segments.start)
  inside = mask[:, 1:] & ~starts[:, 1:]
  same = macro.advantage[:, 1:] == macro.advantage[:, :-1]
  assert same[inside].all()
  assert not macro.return_[~starts].any()
  _, metrics = step(initial_states(), macro, ROWS[0])
  assert metrics['skipped_updates'] == 0


def test_metrics_of_several_updates_are_combined_by_kind():
  """Losses are averaged, deviations take the maximum, skipped updates are summed."""
  updates = [
    Metrics({'policy/loss': 0.75}, {'policy/ratio_max_deviation': 0.125}, {'skipped_updates': 2}),
    Metrics({'policy/loss': 0.25}, {'policy/ratio_max_deviation': 0.5}, {'skipped_updates': 1}),
    Metrics({'policy/loss': 0.5}, {'policy/ratio_max_deviation': 0.25}, {'skipped_updates': 0}),
  ]
  combined = combine_updates(jax.tree.map(jnp.asarray, updates))
  assert jax.device_get(combined) == {
    'policy/loss': 0.5,
    'policy/ratio_max_deviation': 0.5,
    'skipped_updates': 3,
  }
