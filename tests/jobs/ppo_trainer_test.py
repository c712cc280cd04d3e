"""Checks of the first rollout of PPO, and what a step samples from."""

from unittest import mock

import jax
import numpy as np
import pytest
from fixtures import models

from segjax.config.settings import PPO, RolloutSettings, Settings
from segjax.data.batches import endless_batch_indices
from segjax.errors import UserError
from segjax.jobs.ppo_trainer import Trainer, check_first_rollout
from segjax.report.response_log import ResponseLog
from segjax.report.timing import StepTimer
from segjax.run.stage import Stage
from segjax.train.collect import Collector


def test_a_bound_below_the_first_rollouts_kl_is_refused():
  check_first_rollout(9.0, PPO())
  check_first_rollout(-0.1, PPO(skip_if_kl_above=0.5))
  with pytest.raises(UserError, match=r'skip_if_kl_above=0.5 is less than .* rollout, 0.7 nats'):
    check_first_rollout(0.7, PPO(skip_if_kl_above=0.5))


def test_a_step_without_carrying_has_prompts_and_random_numbers_of_its_own(tmp_path):
  rollout = RolloutSettings(samples_per_prompt=2)
  settings = Settings(seed=4, ppo=PPO(rollout_batch_size=6), rollout=rollout)
  stage = Stage('ppo', settings, tmp_path, models.mesh(1))
  collector = mock.Mock(spec=Collector, prompts=range(7), recipe=None)
  collector.collect.side_effect = InterruptedError
  responses = mock.Mock(spec=ResponseLog)
  bases = {'policy': {'base': 'weights'}, 'critic': {}}
  trainer = Trainer(stage, {}, bases, collector, collector, None, responses, StepTimer())
  networks = {name: mock.Mock(params={name: 'trained'}) for name in ('policy', 'critic')}
  with pytest.raises(InterruptedError):
    trainer.step(networks | {'kl': {'coef': 0.1}}, 5)
  (params, rows, key, kl_coef), options = collector.collect.call_args
  policy, critic = {'base': 'weights', 'policy': 'trained'}, {'critic': 'trained'}
  assert params == {'policy': policy, 'critic': critic} and kl_coef == 0.1
  np.testing.assert_array_equal(rows, endless_batch_indices(7, 3, 4, 5))
  assert key == jax.random.fold_in(stage.key('rollout'), 5) and options == {'step': 5}
