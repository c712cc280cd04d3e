"""Collection of experience: custom rewards, stops, held-out metrics, no repeated fetches."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from fixtures.transfers import copies_to_host

from segjax.config.settings import Settings
from segjax.data.batches import Prompts
from segjax.data.ragged import Ragged
from segjax.data.sources import Rows
from segjax.errors import StepAbortedError
from segjax.jobs.ppo_trainer import Trainer
from segjax.report.console import ProgressBar
from segjax.report.metric_log import MetricLog
from segjax.report.response_log import ResponseLog
from segjax.report.timing import StepTimer
from segjax.run.stage import Stage
from segjax.train.collect import Collector, held_out_metrics
from segjax.train.optimizer import init_state
from segjax.train.response_functions import Results
from segjax.types import Normalizer

RECIPE = training.recipe(ppo=dataclasses.replace(training.PPO_SETTINGS, rollout_batch_size=8))
KEY, KL_COEF = jax.random.key(0), np.float32(0.1)


def a_quarter_per_token(responses):
  """Returns 0.25 for each token, and nothing for response 5."""
  values = [[(token, 0.25) for token in range(len(ids))] for ids in responses.ids]
  return Results([*values[:5], None, *values[6:]], ['judge on the prompt x took longer'])


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
    custom_reward=a_quarter_per_token,
  )


@pytest.mark.campaign
def test_steps_copy_nothing_to_the_host_but_tokens_and_metrics(collector, params, tmp_path):
  """Three steps with the log of their metrics, which begins each copy of a step once it is done."""
  settings = dataclasses.replace(RECIPE.ppo, minibatch_size=8, num_ppo_epochs=1, max_steps=3)
  timer = StepTimer()
  trainer = Trainer(
    stage=Stage('ppo', Settings(ppo=settings), tmp_path, models.mesh(1)),
    frozen={name: params[name] for name in ('reference', 'reward')},
    bases={'policy': {}, 'critic': {}},
    collector=dataclasses.replace(collector, on_part=timer.end),
    eval_collector=collector,
    gold=None,
    responses=mock.Mock(spec=ResponseLog),  # copies the responses that it keeps
    timer=timer,
  )
  states = {
    name: init_state(jax.tree.map(jnp.copy, params[name]), training.OPTIMIZER, training.TOTAL)
    for name in ('policy', 'critic')
  }
  states |= {'kl': {'coef': jnp.float32(0.1)}}
  with MetricLog(tmp_path, ProgressBar('ppo', 3), []) as log:
    for step in range(3):
      with copies_to_host() as places:
        states, metrics = trainer.step(states, step)
        log.log(step, metrics)
      first = {'ppo_trainer.step'} if step == 0 else {'metric_log._write'}
      assert set(places) == {'generate.decode'} | first
  assert int(states['policy'].step) == 3
  with copies_to_host() as places:
    assert float(jnp.float32(2)) == 2
  assert places == ['']  # what is patched is what jax calls
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    parts = [line[f'timing/{part}'] for part in ('between_steps', 'generate', 'score', 'update')]
    assert sum(parts) == pytest.approx(line['timing/step']) and line['skipped_updates'] == 0


def test_custom_rewards_reach_the_experience(collector, params):
  lines = []
  sampler = dataclasses.replace(collector.sampler, log=lines.append)
  collector = dataclasses.replace(collector, sampler=sampler)
  collected = collector.collect(params, np.arange(8), KEY, KL_COEF)
  assert lines == [
    'warning: 1 of 8 responses have no reward by reward_shaping.reward_fn; the first: judge on the '
    'prompt x took longer'
  ]
  without = dataclasses.replace(collector, custom_reward=None)
  plain = without.collect(params, np.arange(8), KEY, KL_COEF)
  mask = collected.rollout.response_mask & (np.arange(8) != 5)[:, None]
  added = np.asarray(collected.experience.reward - plain.experience.reward)
  np.testing.assert_allclose(added, np.where(mask, 0.25, 0), atol=1e-5)  # float32


@pytest.mark.parametrize('calls', [1, 3])
def test_a_stop_abandons_the_collection(collector, params, calls):
  """Before the first chunk of tokens or before a later one, or else after the user's reward."""
  asked = iter([False] * (calls - 1) + [True])
  stopping = dataclasses.replace(collector, stop=lambda: next(asked))
  with pytest.raises(StepAbortedError):
    stopping.collect(params, np.arange(8), KEY, KL_COEF)


def test_held_out_metrics_compare_between_steps(collector, params):
  """The same key gives the same figures; `gold` sees each prompt with its row and the step."""

  def gold(responses):
    assert responses.prompts == [f'prompt {i}' for i in range(8)] and responses.step == 3
    assert [responses.row(i)['prompt'] for i in range(8)] == responses.prompts
    assert responses.messages(7) == [{'role': 'user', 'content': 'prompt 7'}]
    with pytest.raises(
      KeyError, match=r"^rows.jsonl, row 3 has no column 'answer'; its keys are pr"
    ):
      responses.row(2)['answer']
    return list(range(1, 9))

  metrics, by_prompt = held_out_metrics(collector, params, KEY, KL_COEF, gold, 3)
  assert metrics['eval/gold'] == np.mean(np.arange(1, 9))
  np.testing.assert_array_equal(by_prompt, np.arange(1, 9))
  again, by_prompt = held_out_metrics(collector, params, KEY, KL_COEF, None, 3)
  assert metrics == again | {'eval/gold': metrics['eval/gold']} and not len(by_prompt)
