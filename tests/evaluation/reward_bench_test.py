"""RewardBench's sections."""

import pytest

from segjax.evaluation import reward_bench


def test_subsets_weigh_as_published():
  chat = dict.fromkeys(reward_bench.SECTIONS['Chat'], 0.0) | {'alpacaeval-easy': 1.0}
  assert reward_bench.scores(chat) == {'Chat': pytest.approx(100 / 358)}
  # Mathematics weighs as much as all of code.
  reasoning = dict.fromkeys(reward_bench.SECTIONS['Reasoning'], 0.0) | {'math-prm': 1.0}
  assert reward_bench.scores(reasoning)['Reasoning'] == 0.5


def test_incomplete_sections_are_left_out():
  assert reward_bench.scores({'alpacaeval-easy': 1.0, 'other': 0.0}) == {}


def test_score_is_the_mean_of_four_sections():
  every = {name: 1.0 for section in reward_bench.SECTIONS.values() for name in section}
  every |= dict.fromkeys(reward_bench.SECTIONS['Safety'], 0.0)
  found = reward_bench.scores(every)
  assert found['Safety'] == 0 and found['Score'] == 0.75
  assert len(every) == 23 and sum(reward_bench.SECTIONS['Safety'].values()) == 740
