"""Collection of experience: custom rewards, stops, held-out metrics, no repeated fetches."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training

from segjax import processes
from segjax.config.settings import Settings
from segjax.data.batches import Prompts
from segjax.data.ragged import Ragged
from segjax.data.sources import Rows
from segjax.jobs.ppo_trainer import Trainer
from segjax.report.response_log import ResponseLog
from segjax.report.timing import StepTimer
from segjax.run.stage import Stage
from segjax.train.collect import Collector, held_out_metrics
from segjax.train.optimizer import init_state
from segjax.types import Normalizer

RECIPE = training.recipe(ppo=dataclasses.replace(training.PPO_SETTINGS, rollout_batch_size=8))
KEY, KL_COEF = jax.random.key(0), np.float32(0.1)


def decode(ids):
  return ' '.join(map(str, ids))


@pytest.fixture(scope='module')
def params():
  mesh = models.mesh(1)
  return {name: training.network(name, mesh) for name in training.SEEDS}


@pytest.fixture
def prompts():
  ids, lengths = training.PROMPTS
  rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
  return Prompts(
    tokens=Ragged.from_rows(rows, np.int32),
    row=np.arange(len(rows)),
    source=Rows([{'prompt': f'prompt {i}'} for i in range(len(rows))], 'rows.jsonl'),
    group=np.arange(len(rows)),
    length=training.PROMPT,
    pad_id=0,
    counts={},
  )


@pytest.fixture
def collector(prompts):
  return Collector(
    prompts,
    training.rollout_sampler(),
    RECIPE,
    jax.tree.map(jnp.float32, Normalizer()),
    custom_reward=lambda texts, ids, mask: np.where(mask, 0.25, 0).astype(np.float32),
  )


def test_a_step_fetches_no_array_that_the_host_has(collector, params, monkeypatch, tmp_path):
  """Decoding fetches tokens; after it, ids, masks and lengths stay on the host."""
  fetched, is_decoding = [], [True]
  to_host = processes.to_host

  def counting_to_host(tree):
    if not is_decoding[0]:
      fetched.append(jax.tree.map(jnp.shape, tree))
    return to_host(tree)

  def on_part(name, arrays):
    is_decoding[0] = False

  monkeypatch.setattr(processes, 'to_host', counting_to_host)
  settings = dataclasses.replace(RECIPE.ppo, minibatch_size=8, num_ppo_epochs=1, max_steps=2)
  trainer = Trainer(
    stage=Stage('ppo', Settings(ppo=settings), tmp_path, models.mesh(1)),
    frozen={name: params[name] for name in ('reference', 'reward')},
    collector=dataclasses.replace(collector, on_part=on_part),
    eval_collector=collector,
    gold=None,
    decode=decode,
    responses=mock.Mock(spec=ResponseLog),  # fetches the responses that it keeps
    timer=StepTimer(),
  )
  states = {
    name: init_state(jax.tree.map(jnp.copy, params[name]), training.OPTIMIZER, training.TOTAL)
    for name in ('policy', 'critic')
  }
  states, metrics = trainer.step(states | {'kl': {'coef': jnp.float32(0.1)}}, 0)
  assert fetched == [] and not is_decoding[0]
  assert metrics['skipped_updates'] == 0 and int(states['policy'].step) == 1


def test_custom_rewards_reach_the_experience(collector, params):
  collected = collector.collect(params, np.arange(8), KEY, KL_COEF)
  without = dataclasses.replace(collector, custom_reward=None)
  plain = without.collect(params, np.arange(8), KEY, KL_COEF)
  mask = collected.rollout.response_mask
  added = np.asarray(collected.experience.reward - plain.experience.reward)
  np.testing.assert_allclose(added, np.where(mask, 0.25, 0), atol=1e-5)  # float32


def test_a_stop_abandons_the_collection(collector, params):
  def check_stop():
    raise InterruptedError

  with pytest.raises(InterruptedError):
    stopping = dataclasses.replace(collector, check_stop=check_stop)
    stopping.collect(params, np.arange(8), KEY, KL_COEF)


def test_held_out_metrics_compare_between_steps(collector, params):
  """The same key gives the same figures; `gold` sees each prompt with its response."""
  pairs = []

  def gold(prompt, response):
    pairs.append((prompt, response))
    return len(pairs)

  metrics = held_out_metrics(collector, params, KEY, KL_COEF, gold, decode)
  assert [prompt for prompt, _ in pairs] == [f'prompt {i}' for i in range(8)]
  assert metrics['eval/gold'] == np.mean(np.arange(1, 9))
  assert metrics == held_out_metrics(collector, params, KEY, KL_COEF, None, decode) | {
    'eval/gold': metrics['eval/gold']
  }
