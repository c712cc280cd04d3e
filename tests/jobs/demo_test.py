"""results.json of a demo run."""

import json

import pytest

from segjax.jobs.registry import JOBS

AFTER = {'gold': {'mean': 0.5}, 'kl_nats': 7.0, 'eos_rate': 1.0, 'length': 9.0, 'segments': 3.0}


def test_a_later_evaluation_updates_the_figures(small, make_stage, tmp_path):
  """Or results.json would contradict report.html, which shows the later one."""
  path = tmp_path / 'results.json'
  record = {'seed': 1, 'gold': 'old', 'kl_nats': 'old', 'reward_accuracy': {'held_out': 0.9}}
  path.write_text(json.dumps(record))
  stage = make_stage('evaluate', small('evaluate'))
  results = {'evaluate': {'before': {'gold': {'mean': 0.1}}, 'after': AFTER}}
  JOBS['evaluate'].after_run(stage, results, 0.0)
  updated = json.loads(path.read_text())
  assert updated['gold'] == {'before': {'mean': 0.1}, 'after': {'mean': 0.5}}
  assert updated['kl_nats'] == 7.0
  assert {k: updated[k] for k in ('seed', 'reward_accuracy')} == {
    'seed': 1,
    'reward_accuracy': {'held_out': 0.9},
  }


@pytest.mark.parametrize('text', ['{"gold": 1}', '[1]', '{', None])
def test_another_file_is_left_as_it_is(small, make_stage, tmp_path, text):
  path = tmp_path / 'results.json'
  if text is not None:
    path.write_text(text)
  stage = make_stage('evaluate', small('evaluate'))
  JOBS['evaluate'].after_run(stage, {'evaluate': {'before': {}, 'after': AFTER}}, 0.0)
  assert (path.read_text() if text is not None else None) == text
  assert path.exists() == (text is not None)
