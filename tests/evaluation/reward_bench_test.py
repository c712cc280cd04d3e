"""The scores of RewardBench's sections."""

import pytest

from segjax.evaluation import reward_bench


def test_subsets_have_the_published_weights():
  chat = dict.fromkeys(reward_bench.SECTIONS['Chat'], 0.0) | {'alpacaeval-easy': 1.0}
  assert reward_bench.section_scores(chat) == {'Chat': pytest.approx(100 / 358)}
  # math-prm has the weight of all code subsets together.
  reasoning = dict.fromkeys(reward_bench.SECTIONS['Reasoning'], 0.0) | {'math-prm': 1.0}
  assert reward_bench.section_scores(reasoning)['Reasoning'] == 0.5


def test_incomplete_sections_are_left_out():
  assert reward_bench.section_scores({'alpacaeval-easy': 1.0, 'other': 0.0}) == {}


def test_score_is_the_mean_of_four_sections():
  accuracies = {name: 1.0 for section in reward_bench.SECTIONS.values() for name in section}
  accuracies |= dict.fromkeys(reward_bench.SECTIONS['Safety'], 0.0)
  scores = reward_bench.section_scores(accuracies)
  assert scores['Safety'] == 0 and scores['Score'] == 0.75
  assert len(accuracies) == 23 and sum(reward_bench.SECTIONS['Safety'].values()) == 740
