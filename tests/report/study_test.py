"""What a person sees of a study: tables, verdicts, charts, files."""

import json

import numpy as np
import pytest

from segjax.evaluation.study_summary import summarize
from segjax.report import study_charts, study_table
from segjax.report.stage_tables import stage_tables
from segjax.report.study_plots import band


def _record(arm, seed, gold, **changes):
  at = {'8': gold + 0.1 * seed, '4': gold, 'end': gold + 0.2}
  record = {
    'arm': arm,
    'language': 'describe',
    'seed': seed,
    'status': 'done',
    'prompts': {where: [value - 0.05, value + 0.05] for where, value in at.items()},
    'curve': [[0.0, -0.2], [9.0 + seed, gold]],
    'gold_end': gold + 0.2,
    'area': gold / 2,
    'credit': gold,
    'length': 18.0,
    'seconds': 100.0,
  }
  return record | changes


@pytest.fixture(scope='module')
def records():
  """Three seeds of three arms; one cell never reached 8 nats, one has failed."""
  cells = [_record('segment', seed, 0.5) for seed in range(3)]
  cells += [_record('bandit', seed, 0.2 + 0.01 * seed) for seed in range(3)]
  gold = [_record('gold', seed, 0.9) for seed in range(2)]
  del gold[1]['prompts']['8']
  failed = {'arm': 'gold', 'language': 'describe', 'seed': 2, 'status': 'failed', 'error': 'x'}
  return [*cells, *gold, failed]


@pytest.fixture(scope='module')
def results(records):
  levels = ['8', '4']
  summary = summarize(records, ['segment', 'bandit', 'gold'], ['bandit'], levels)
  return {'progress': '9 of 12 cells', 'levels': levels, 'summary': json.loads(json.dumps(summary))}


def test_summary_counts_what_ended_and_compares_what_reached_a_level(results):
  part = results['summary']['describe']
  gold = part['arms']['gold']
  assert (gold['cells'], gold['failed'], gold['diverged']) == (3, 1, 0)
  assert gold['gold']['8']['n'] == 1 and gold['gold']['end']['n'] == 2
  bandit, yardstick = part['comparisons']['8']
  assert bandit['difference']['mean'] == pytest.approx(-0.29)
  assert bandit['adjusted_p'] == bandit['p'] == 2 / 8
  assert yardstick['adjusted_p'] is None and yardstick['difference']['n'] == 1
  assert part['verdicts'][0].startswith('segment > bandit by 0.29 [0.28, 0.30] at 8 nats')


def test_table_in_markdown(results):
  text = study_table.markdown('Study', results)
  lines = text.splitlines()
  assert lines[:3] == ['# Study', '', '9 of 12 cells.']
  assert '* gold and segment: no verdict from 1 seed at 8 nats' in lines
  assert '| gold | 0.90 | 0.90 (1) | 1.10 | 1.10 | 0.90 |' in lines
  head = '|  | difference [95 %] | seeds | P | p | p after Holm |'
  assert lines.count(head) == 3
  assert '| gold | 3 | 1 | 0 | 100 |' in lines


def test_tables_of_the_page_show_the_differences_on_one_scale(results):
  tables = stage_tables('study', results)
  assert [len(table.rows) for table in tables] == [4, 3, 2, 2, 2, 3, 3, 3]
  bandit, gold = tables[2].rows
  (mark,) = bandit.marks
  assert mark.high < 0.5 and bandit.middle == 0.5 and gold.marks == ()


def test_band_is_the_mean_at_equal_kl():
  curves = [[(0, 0), (10, 1)], [(0, 0), (4, 0.8), (6, 0.8)], [(0, 0), (2, 1)]]
  result = band(curves)
  assert result.kl[-1] == 6
  at = {x: np.interp(x, result.kl, result.mean) for x in (1.0, 5.0)}
  assert at[1.0] == pytest.approx((0.1 + 0.2 + 0.5) / 3, abs=1e-6)
  assert at[5.0] == pytest.approx((0.5 + 0.8) / 2, abs=0.02)
  assert np.isfinite(result.low).all() and (result.low <= result.mean + 1e-12).all()


def test_one_run_has_a_curve_without_a_band():
  result = band([[(0, 0.0), (2, 1.0)]])
  assert np.isfinite(result.mean).all() and np.isnan(result.low).all()


def test_charts_are_read_from_the_files(records, results, tmp_path):
  assert list(study_charts.study_charts(tmp_path)) == []
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  (tmp_path / 'results.jsonl').write_text(lines)
  study_charts.write_summary(tmp_path, results['summary'])
  titles = [title for title, _, _ in study_charts.study_charts(tmp_path)]
  assert titles == [
    'Gold reward over KL, describe',
    'Differences, describe',
    'Gold reward and credit, describe',
  ]
  study_charts.write_pngs(tmp_path)
  for name in ('gold_over_kl-describe.png', 'differences-describe.png', 'credit-describe.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
