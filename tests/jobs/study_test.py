"""A small study through the command's own job: its runs, its files, a cell that fails."""

import json

import pytest
from fixtures import runs

from configs import study as config
from segjax.config import parse
from segjax.config.settings import replace
from segjax.errors import UserError
from segjax.run import stage_record

TINY = {
  **runs.SIZES,
  'demo.pairs': 64,
  'sft.batch_size': 8,
  'sft.max_steps': 2,
  'reward.batch_size': 8,
  'reward.max_steps': 2,
  'reward.holdout_fraction': 0.25,
  'normalizer.batch_size': 8,
  'normalizer.max_pairs': 16,
  'ppo.max_steps': 2,
  'ppo.rollout_batch_size': 16,
  'ppo.minibatch_size': 8,
  'ppo.eval_every': 1,
  'rollout.max_new_tokens': 8,
  'evaluate.batch_size': 16,
  'evaluate.samples_per_prompt': 1,
  'study.seeds': ('0:2',),
  'study.jobs': 2,
  'study.trials': 0,
  # The third arm's own runs stop at once.
  'study.arms': (
    'even_split',
    'end_only reward_shaping.spread=end_only',
    'wrong critic.init=no/such/path',
  ),
}


@pytest.mark.campaign
def test_a_study_of_three_arms_of_which_one_fails(run, tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')  # one device, quickly
  values = config.get_config()
  values.update_from_flattened_dict(TINY)
  settings = parse.from_config(values)
  with pytest.raises(
    UserError, match=r'3 of 9 cells failed, .*wrong requests seed 0: config.critic.init='
  ):
    run(settings)
  directory = tmp_path / 'study'
  records = [json.loads(line) for line in (directory / 'results.jsonl').read_text().splitlines()]
  statuses = {(record['arm'], record['seed']): record['status'] for record in records}
  assert len(statuses) == 9
  assert {statuses['wrong', seed] for seed in range(3)} == {'failed'}
  assert 'failed' not in {status for (arm, _), status in statuses.items() if arm != 'wrong'}
  for record in records[:2]:
    # Twelve subjects are held out, each with twelve prompts.
    assert len(record['prompts']['end']) == 144 and record['curve'][0][0] == 0
    assert record['settings'] in ({}, {'reward_shaping.spread': 'end_only'})
  logs = [path.read_text() for path in (tmp_path / 'runs').glob('*/log.txt')]
  assert len(logs) == 18 and not any('was not written' in text for text in logs)
  table = (directory / 'table.md').read_text()
  assert '9 of 9 cells.' in table and '| wrong | 3 | 3 | 0 |' in table
  kinds = sorted(path.name.partition('-')[0] for path in (tmp_path / 'runs').iterdir())
  assert kinds == [*['base'] * 3, *['cell'] * 9, *['normalizer'] * 3, *['reward'] * 3]

  # What is finished stays: without the wrong arm nothing runs, and the lines are the same.
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').rglob('stage.json')}
  again = replace(settings, **{'study.only': ('end_only',), 'study.jobs': 1})
  results = run(again)['study']
  assert {path: path.stat().st_mtime_ns for path in before} == before
  kept = [record for record in records if record['arm'] != 'wrong']
  text = (directory / 'results.jsonl').read_text()
  assert [json.loads(line) for line in text.splitlines()] == kept
  assert results['progress'] == '6 of 6 cells'
  (comparison,) = results['summary']['requests']['comparisons']['end']
  assert comparison['arm'] == 'end_only' and comparison['difference']['n'] == 3
  page = (tmp_path / 'report.html').read_text()
  assert 'Gold reward over KL, requests' in page and 'gold minus that of even_split' in page
  assert (directory / 'gold_over_kl-requests.png').exists()
  responses = [json.loads(line) for line in (directory / 'samples.jsonl').read_text().splitlines()]
  assert {row['model'] for row in responses} == {'even_split, requests', 'end_only, requests'}
  # More processes at once change no key.
  key = stage_record.stored_key(directory)
  assert run(replace(again, **{'study.jobs': 3}))['study'] == results
  assert stage_record.stored_key(directory) == key
