"""Responses that go on in the next rollout: their tokens, log-probs and order, the saved state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training

from segjax.data.batches import Prompts, stream_rows
from segjax.data.ragged import Ragged
from segjax.data.sources import Rows
from segjax.model import decode_memory, scheduler
from segjax.model.generate import GenerationOptions, generate
from segjax.train import carry
from segjax.train import rollout as rollouts
from segjax.train.checkpoint import Checkpointer
from segjax.train.rollout import make_decoder
from segjax.train.rollout_rows import concat_prompt_response
from segjax.train.rollout_scoring import policy_logprobs

BATCH, CHUNK = 8, 4  # responses of a rollout; tokens after which one may end
ROWS, SEED, KEY = 64, 3, jax.random.key(5)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  """Lets rollouts end inside of the short responses of these tests."""
  monkeypatch.setattr(rollouts, 'make_decoder', functools.partial(make_decoder, chunk=CHUNK))


@functools.cache
def stream():
  lengths = np.random.default_rng(1).integers(1, training.PROMPT, ROWS)
  rows = [models.ids(seed, (length,)) for seed, length in enumerate(lengths)]
  prompts = Prompts(
    tokens=Ragged.from_rows(rows, np.int32),
    row=np.arange(ROWS),
    source=Rows([{'prompt': f'{i}'} for i in range(ROWS)], 'rows.jsonl'),
    group=np.arange(ROWS),
    length=training.PROMPT,
    pad_id=0,
    counts={},
  )
  return carry.Stream(prompts, SEED, KEY, BATCH, training.RESPONSE)


@functools.cache
def policies():
  """Returns the policies of four steps, further apart than updates would move them."""
  rng = np.random.default_rng(0)

  def moved(policy):
    return jax.tree.map(lambda x: x + 0.03 * rng.normal(size=x.shape).astype(np.float32), policy)

  made = [training.network('policy', models.mesh(1))]
  for _ in range(3):
    made.append(moved(made[-1]))
  return made


def run(policies, carried=None, first=0, recompute=None, mesh=None, **values):
  """Returns the rollout of each step, with what it leaves on the host."""
  mesh = mesh or models.mesh(1)
  carried = carried or carry.nothing_carried(stream(), mesh)
  steps = []
  for step, policy in enumerate(policies, first):
    sampler = training.rollout_sampler(mesh, **values)
    again = recompute and functools.partial(recompute, policy)
    sampled = carry.rollout(policy, carried, step, stream(), sampler, again)
    carried = sampled.carried
    steps.append(sampled._replace(carried=jax.device_get(carried)))
  return steps


@functools.cache
def four_steps():
  return run(policies())


def positions(step):
  """Returns the position in the stream of each response's prompt."""
  return np.argsort(stream_rows(ROWS, SEED, np.arange(ROWS)))[step.rows]


def left(step):
  """Returns {position of the prompt: tokens so far} of the responses that a step leaves."""
  _, responses = step.carried
  used = responses.position >= 0
  return dict(zip(responses.position[used].tolist(), responses.count[used].tolist(), strict=True))


def drawn_by(number):
  """Returns the step that drew each token of the responses of a step, [B, T]."""
  steps = four_steps()
  drawn = np.full((BATCH, training.RESPONSE), number)
  for earlier in reversed(range(number)):
    counts = left(steps[earlier])
    for row, position in enumerate(positions(steps[number]).tolist()):
      drawn[row, : counts.get(position, 0)] = earlier
  return drawn


def full_forward(policy, rollout):
  """Returns the log-probs of the responses, [B, T]."""
  full, _ = models.token_logprobs(policy, concat_prompt_response(rollout), models.CONFIG)
  index = np.asarray(rollout.prompt_length)[:, None] + np.arange(training.RESPONSE)
  return np.take_along_axis(np.asarray(full), np.minimum(index, full.shape[1] - 1), axis=1)


@pytest.mark.campaign
def test_log_probs_are_those_of_the_policies_that_drew_each_token():
  mixed = 0
  for number, step in enumerate(four_steps()):
    rollout, drawn = step.rollout.arrays, drawn_by(number)
    by_policy = np.stack([full_forward(policy, rollout) for policy in policies()])
    expected = np.take_along_axis(by_policy, drawn[None], axis=0)[0]
    mask = step.rollout.response_mask
    np.testing.assert_allclose(rollout.old_logprob[mask], expected[mask], atol=1e-4)
    # The stop tokens are banned from the first token, which changes its sample_logprob.
    later = mask & (np.arange(training.RESPONSE) > 0)
    np.testing.assert_allclose(rollout.sample_logprob[later], expected[later], atol=1e-4)
    older = mask & (drawn < number)
    mixed += older.sum()
    # The test could not fail if the policies gave the same log-probs.
    assert not older.any() or np.abs(by_policy[number] - expected)[older].max() > 0.05
    np.testing.assert_array_equal(rollout.carried, (mask & (drawn < number)).sum(axis=1))
  assert mixed > 20


@pytest.mark.campaign
def test_responses_of_one_policy_do_not_depend_on_where_rollouts_end():
  """While the policy stays as it is, carrying changes neither tokens nor log-probs."""
  steps = run([policies()[0]] * 3)
  assert sum(step.metrics['rollout/carried_responses'] for step in steps) > 4
  assert_equal_to_one_generation(steps)


def assert_equal_to_one_generation(steps):
  position = np.concatenate([positions(step) for step in steps])
  prompts = stream().prompts.gather(np.concatenate([step.rows for step in steps]), np.asarray)
  sampler = training.rollout_sampler()
  at_once = generate(
    policies()[0],
    prompts,
    KEY,
    decoder=rollouts.decode_config(sampler),
    mesh=sampler.mesh,
    options=GenerationOptions(prompt_index=position),
  )
  arrays = [step.rollout.arrays for step in steps]
  for name in ('response_ids', 'response_mask', 'finished'):
    carried = np.concatenate([getattr(x, name) for x in arrays])
    np.testing.assert_array_equal(carried, getattr(at_once, name), err_msg=name)
  logprob = np.concatenate([x.old_logprob for x in arrays])
  np.testing.assert_allclose(logprob, at_once.logprob, atol=1e-4)


def assert_every_prompt_is_answered_once(steps):
  answered = []
  for step in steps:
    answered += positions(step).tolist()
    open_ = left(step)
    assert sorted([*answered, *open_]) == list(range(int(step.carried.cursor)))
    assert len(open_) <= training.ROLLOUT.max_concurrent


@pytest.mark.campaign
def test_every_prompt_of_the_stream_is_answered_once():
  assert_every_prompt_is_answered_once(four_steps())
  for step in four_steps():
    at_limit = step.rollout.response_mask.all(axis=1)
    assert (step.rollout.finished | at_limit).all()


@pytest.mark.campaign
def test_responses_that_break_off_are_not_carried():
  """Token 5 has a corrupted embedding: prompts with it have empty responses."""
  broken = jax.tree.map(jnp.copy, policies()[0])
  broken['backbone']['embedding'] = broken['backbone']['embedding'].at[5].set(np.nan)
  lines = []
  steps = run([broken] * 3, log=lines.append)
  assert_every_prompt_is_answered_once(steps)
  empty = [i for step in steps for i in np.flatnonzero(~step.rollout.response_mask.any(axis=1))]
  assert empty and sum('after 0 tokens' in line for line in lines) == len(empty)


@pytest.mark.campaign
def test_responses_that_wait_for_pages_are_carried(monkeypatch):
  """Rows that give their pages back keep their tokens, wherever the rollout ends."""
  make = functools.partial(make_decoder, chunk=CHUNK)
  small_pages = lambda *args: dataclasses.replace(make(*args), page_size=4)  # noqa: E731
  monkeypatch.setattr(rollouts, 'make_decoder', small_pages)
  settle, waited = decode_memory.settle_pool, []
  monkeypatch.setattr(
    decode_memory, 'settle_pool', lambda *args, **kw: settle(*args, **kw)._replace(pages=12)
  )
  reserve = scheduler.Scheduler._reserve

  def counted(self, group):
    before = len(self._waiting)
    reserve(self, group)
    waited.append(len(self._waiting) - before)

  monkeypatch.setattr(scheduler.Scheduler, '_reserve', counted)
  steps = run([policies()[0]] * 4)
  assert_every_prompt_is_answered_once(steps)
  assert sum(waited) > 0
  assert_equal_to_one_generation(steps)


@pytest.mark.devices
def test_eight_devices_draw_the_same_responses():
  """Rollouts may end elsewhere, since the rows divide over the devices; tokens are the same."""
  mesh = models.mesh(8)
  placed = models.place(policies()[0], mesh)
  with jax.set_mesh(mesh):
    several = run([placed] * 3, mesh=mesh)
  assert_every_prompt_is_answered_once(several)
  assert sum(step.metrics['rollout/carried_responses'] for step in several) > 4
  assert_equal_to_one_generation(several)


def test_recomputed_log_probs_are_those_of_full_forwards_before_the_policy_changes():
  """Those of tokens that are carried further are not computed again by a later policy."""
  recipe = training.recipe()

  def recompute(policy, rollout, length):
    logprob = policy_logprobs(policy, rollout, length, recipe=recipe)
    return logprob - 1.0  # a mark, and far from the log-probs of decoding

  plain, marked = four_steps(), run(policies(), recompute=recompute)
  for number, (first, second) in enumerate(zip(plain, marked, strict=True)):
    np.testing.assert_array_equal(first.rollout.response_ids, second.rollout.response_ids)
    is_older = first.rollout.response_mask & (drawn_by(number) < number)
    gap = np.asarray(second.rollout.arrays.old_logprob - first.rollout.arrays.old_logprob)
    np.testing.assert_allclose(gap, -1.0 * is_older, atol=1e-4)


def test_metrics_equal_a_loop():
  began = {}
  for number, step in enumerate(four_steps()):
    before = left(four_steps()[number - 1]) if number else {}
    before = {position: count for position, count in before.items() if count}
    tokens, older, ages = 0, 0, []
    for row, position in enumerate(positions(step).tolist()):
      tokens += int(step.rollout.response_mask[row].sum())
      older += before.get(position, 0)
      ages.append(number - began.get(position, number))
    for position, count in left(step).items():
      if count:
        began.setdefault(position, number)
    assert step.metrics == {
      'rollout/carried_responses': len(before),
      'rollout/carried_tokens': sum(before.values()),
      'rollout/older_share': pytest.approx(older / tokens),
      'rollout/age_mean': pytest.approx(np.mean(ages)),
      'rollout/age_max': max(ages),
    }
  assert step.metrics['rollout/age_max'] >= 1


def test_a_restored_state_goes_on_with_the_same_bits(tmp_path):
  steps = four_steps()
  states = {'carried': jax.device_put(steps[1].carried, models.mesh(1).devices.flat[0])}
  checkpoints = Checkpointer(tmp_path, keep=1)
  checkpoints.save(2, states)
  like = {'carried': carry.nothing_carried(stream(), models.mesh(1))}
  _, restored = checkpoints.restore(like)
  checkpoints.close()
  again = run(policies()[2:], restored['carried'], 2)
  for first, second in zip(steps[2:], again, strict=True):
    assert first.metrics == second.metrics
    np.testing.assert_array_equal(first.rows, second.rows)
    jax.tree.map(np.testing.assert_array_equal, first.rollout.arrays, second.rollout.arrays)
    jax.tree.map(np.testing.assert_array_equal, first.carried, second.carried)
