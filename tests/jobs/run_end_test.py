"""What a run prints: which stage of how many, an estimate of its time, the end in one sentence."""

import dataclasses
import json

import numpy as np
import pytest

from segjax.jobs import evaluate_summary, run_end
from segjax.jobs.registry import JOBS
from segjax.jobs.run_estimate import RunEstimate, count_work
from segjax.report import console
from segjax.run.stage import Stage


def _figures(before, after, low, high):
  gain = {'mean': after - before, 'low': low, 'high': high}
  return {
    'before': {'gold': {'mean': before}},
    'after': {'gold': {'mean': after}, 'gold_gain': gain},
  }


@pytest.mark.parametrize(
  'figures, sentence',
  [
    (
      _figures(-0.25, 0.5, 0.7, 0.8),
      'rose from -0.250 before PPO to 0.500 after it: +0.750, 95 % interval [+0.700, +0.800]',
    ),
    (_figures(0.5, 0.25, None, None), 'fell from 0.500 before PPO to 0.250 after it: -0.250'),
    (_figures(0.25, 0.5, -0.1, 0.6), 'did not change measurably, from 0.250 before PPO to 0.500'),
  ],
)
def test_an_evaluation_ends_in_one_sentence(make_stage, small, figures, sentence):
  stage = make_stage('evaluate', small('evaluate'))
  assert f'gold reward on held-out prompts {sentence}' in evaluate_summary.headline(stage, figures)


def test_training_says_how_its_metric_changed(make_stage, small):
  stage = make_stage('sft', small('sft'))
  stage.directory.mkdir()
  lines = [{'step': step, 'sft/loss': loss} for step, loss in enumerate(np.linspace(4, 2, 21))]
  (stage.directory / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  assert JOBS['sft'].headline(stage, {}) == (
    'cross-entropy, nats per token, fell from 3.950 to 2.050 in 21 steps (means of 2 steps)'
  )
  assert run_end.describe_change(stage, 'sft/entropy', 'entropy') == ''


def test_a_frozen_policy_does_not_rise(make_stage, small):
  stage = make_stage('ppo', small('ppo', **{'ppo.policy_optimizer.learning_rate': 0.0}))
  stage.directory.mkdir()
  lines = [{'step': step, 'objective/reward': float(step)} for step in range(3)]
  (stage.directory / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  assert 'policy was not trained' in JOBS['ppo'].headline(stage, {})


def test_reward_training_says_how_often_the_chosen_response_wins(make_stage, small):
  results = {'held_out_accuracy': 0.75, 'held_out_pairs': 1200}
  sentence = JOBS['reward'].headline(make_stage('reward', small('reward')), results)
  assert sentence.endswith('in 75.0% of 1,200 held-out pairs, 95 % interval [72.5%, 77.4%]')


def test_a_run_says_its_stage_and_where_the_report_is(
  run, small, fake_jobs, tmp_path, capsys, monkeypatch
):
  fake_jobs(sft=lambda stage: {'loss': 1.0}, reward=lambda stage: {'accuracy': 0.5})
  for name, headline in (('sft', lambda *_: 'the loss fell'), ('reward', lambda *_: '')):
    monkeypatch.setitem(JOBS, name, dataclasses.replace(JOBS[name], headline=headline))
  settings = small('sft', 'reward', **{'policy.path': str(tmp_path), 'data.path': str(tmp_path)})
  run(settings, tmp_path / 'run')
  out = capsys.readouterr().out
  assert '\nstage 1 of 2: sft\n' in out and '\nstage 2 of 2: reward, about ' in out
  *_, sentence, last = out.splitlines()
  assert sentence == 'The loss fell.'
  assert last.endswith(f' in total; the report is {tmp_path}/run/report.html')


def test_a_run_without_files_names_no_report(run, small, fake_jobs, tmp_path, capsys):
  fake_jobs(chat=lambda stage: {})
  run(small('chat', **{'policy.path': str(tmp_path)}), tmp_path / 'run')
  assert capsys.readouterr().out.splitlines()[-1].endswith(' in total')


def test_later_stages_are_estimated_by_their_work(one_device, small, tmp_path):
  settings = small('demo', 'sft', 'reward', 'ppo', **{'ppo.num_ppo_epochs': 1})
  stages = [Stage(name, settings, tmp_path / name, one_device) for name in settings.stages]
  work = {stage.name: count_work(stage) for stage in stages}
  assert work['demo'] == 0
  assert work['sft'] == 2 * 8 * 96 * 3 and work['reward'] == 2 * 2 * 8 * 96 * 4
  assert work['ppo'] == 2 * 8 * (32 + 8) * 10
  estimate = RunEstimate(stages)
  assert estimate.begin('demo') is None
  estimate.record('demo', 100.0)
  assert estimate.begin('sft') is None  # nothing that is comparable has been timed
  later = (work['reward'] + work['ppo']) / work['sft']
  assert estimate.seconds_after('sft', 6.0) == pytest.approx(6 * later)
  estimate.record('sft', 6.0)
  assert estimate.begin('reward') == pytest.approx(6 * later)
  assert estimate.seconds_after('ppo', 6.0) is None


def test_work_without_rows_is_unknown(make_stage, small):
  settings = small('sft', **{'sft.max_steps': 0, 'data.path': 'no/such/rows.jsonl'})
  assert count_work(make_stage('sft', settings)) == 0


def test_durations():
  assert [console.format_duration(s) for s in (41.6, 185.0, 7800.0)] == [
    *('42 s', '3 min 5 s', '2 h 10 min')
  ]
