"""Every metric is described once; an old name is an error with the new one."""

import pytest

from segjax.errors import UserError
from segjax.report import metric_docs


def test_names_are_unique_and_have_entries():
  names = [name for entry in metric_docs.ENTRIES for name in entry.names]
  assert len(names) == len(set(names))
  for entry in metric_docs.ENTRIES:
    assert all(metric_docs.find_entry(name) is entry for name in entry.names)
    assert entry.description


def test_patterns_match_names():
  assert 'tenth' in metric_docs.find_entry('reward/by_position/7').description
  assert 'gradient' in metric_docs.find_entry('critic/grad_norm').description
  assert metric_docs.find_entry('reward/segmentmean') is None


@pytest.mark.parametrize(
  'old, present',
  [
    ('val/loss', 'critic/loss'),
    ('bad', 'skipped_updates'),
    ('reward/z_by_position/3', 'reward/by_position/3'),
    ('rollout/sampling_gap', 'rollout/logprob_mismatch'),
    ('rollout/sampling_gap_max', 'rollout/logprob_mismatch_max'),
    ('train/loss', 'sft/loss in SFT and reward_model/loss in reward training'),
  ],
)
def test_an_old_name_is_an_error_with_the_new_one(old, present):
  with pytest.raises(UserError, match=f'metrics {old} is now {present}$'):
    metric_docs.plain_text(old)
  assert metric_docs.find_entry(present.partition(' ')[0])


def test_text_for_a_terminal():
  text = metric_docs.plain_text()
  assert all(name in text for entry in metric_docs.ENTRIES for name in entry.names)
  assert '`' not in text and max(map(len, text.splitlines())) <= 100
  assert metric_docs.plain_text('eval/*').count('unhealthy') == 4
  assert metric_docs.plain_text('reward/by_position/3').startswith('reward/by_position/*\n')
  with pytest.raises(UserError, match='nothing/like_it: there is no such metric'):
    metric_docs.plain_text('nothing/like_it')
