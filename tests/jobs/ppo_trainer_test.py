"""Checks of the first rollout of PPO."""

import pytest

from segjax.config.settings import PPO
from segjax.errors import UserError
from segjax.jobs.ppo_trainer import check_first_rollout


def test_a_bound_below_the_first_rollouts_kl_is_refused():
  check_first_rollout(9.0, PPO())
  check_first_rollout(-0.1, PPO(skip_if_kl_above=0.5))
  with pytest.raises(UserError, match=r'skip_if_kl_above=0.5 is less than .* rollout, 0.7 nats'):
    check_first_rollout(0.7, PPO(skip_if_kl_above=0.5))
