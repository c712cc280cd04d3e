"""Rejection sampling: what is kept, and its rows through sft."""

import json

import numpy as np
import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.jobs import sample
from segjax.types import Normalizer


def test_the_best_that_end_are_kept_and_the_first_of_equals():
  value = np.array([[1.0, 3.0, 2.0, 3.0], [5.0, 1.0, 1.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
  finished = np.array([[True] * 4, [False, True, True, True], [False] * 4])
  best = [[False, True, False, False], [False, True, False, False], [False] * 4]
  np.testing.assert_array_equal(sample.best_of(value, finished, 1), best)
  two = [[False, True, False, True], [False, True, True, False], [False] * 4]
  np.testing.assert_array_equal(sample.best_of(value, finished, 2), two)


@pytest.mark.campaign
def test_the_rows_that_are_kept_train_sft(small, run, language, tmp_path):
  model = language / 'model'
  segmentation = Segmentation(boundary='delimiter')
  reward_model = runs.reward_model(model, tmp_path / 'rm', Normalizer(), segmentation)
  values = {
    'policy.path': str(model),
    'reward_model.path': str(reward_model),
    'data.path': str(language / 'rows' / 'held_out.jsonl.gz'),
    'sample.samples_per_prompt': 4,
    'sample.batch_size': 16,
  }
  results = run(small('sample', **values), tmp_path / 'run')['sample']
  directory = tmp_path / 'run' / 'sample'
  records = [json.loads(line) for line in (directory / 'responses.jsonl').read_text().splitlines()]
  best = [json.loads(line) for line in (directory / 'best.jsonl').read_text().splitlines()]
  assert len(records) == results['responses'] == 4 * results['prompts']
  assert best == [record for record in records if record['kept']] and best
  for number in range(results['prompts']):
    group = records[4 * number : 4 * number + 4]
    assert len({json.dumps(record['messages'][:-1]) for record in group}) == 1
    scores = [record['score'] for record in group if record['finished']]
    kept = [record['score'] for record in group if record['kept']]
    assert kept == ([max(scores)] if scores else [])
    assert len({record['messages'][-1]['content'] for record in group}) > 1
  assert results['best']['mean'] > results['all']['mean']
  # The numbers of a response do not depend on the batch that it is in.
  again = run(small('sample', **values | {'sample.batch_size': 8}), tmp_path / 'again')['sample']
  assert again['kept'] == results['kept']
  other = (tmp_path / 'again' / 'sample' / 'responses.jsonl').read_text().splitlines()
  texts = [json.loads(line)['messages'] for line in other]
  assert texts == [record['messages'] for record in records]
  # Segment by segment, one response to each prompt is found, with a higher score than most.
  found = run(small('sample', **values | {'sample.search': 'segment'}), tmp_path / 'searched')
  assert found['sample']['responses'] == results['prompts']
  assert found['sample']['all']['mean'] > results['all']['mean']
  trained = run(
    small(
      'sft',
      **{
        'policy.path': str(model),
        'data.path': str(directory / 'best.jsonl'),
        'sft.batch_size': 4,
      },
    ),
    tmp_path / 'sft',
  )
  assert np.isfinite(trained['sft']['loss'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sample.search': 'segment', 'sample.keep': 2}, 'finds one response to a prompt'),
    ({'rollout.temperature': 0.0}, 'temperature=0 samples equal responses'),
    ({'sample.keep': 9}, 'sample.keep=9 is above sample.samples_per_prompt=8; lower it'),
    ({'sample.batch_size': 12}, 'sample.batch_size=12 is not a multiple of'),
    (
      {
        'reward_shaping.reward_model_weight': 0.0,
        'reward_shaping.reward_fn': 'segjax.verifiers:valid_json',
      },
      'rank_by=score needs a reward model',
    ),
  ],
)
def test_wrong_settings_are_refused_in_one_line(small, changes, message):
  settings = small('sample', **changes)
  with pytest.raises(UserError, match=message):
    sample.check_ranking(settings)
