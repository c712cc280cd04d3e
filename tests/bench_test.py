"""The benchmarks run and give consistent records; no test depends on their timings."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'bench.py'


@pytest.fixture
def bench(monkeypatch, capsys):
  """Runs the tool and parses the last line of its output."""
  monkeypatch.setattr(sys, 'path', list(sys.path))

  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *arguments])
    runpy.run_path(str(TOOL), run_name='__main__')
    *_, last = capsys.readouterr().out.splitlines()
    return json.loads(last)

  return run


def test_rewards(bench):
  record = bench('rewards', '--batch=4', '--length=16')
  assert record['benchmark'] == 'rewards' and record['batch'] == 4 and record['length'] == 16
  assert record['milliseconds'] > 0 and record['ratio'] > 0
  assert record['largest_difference'] < 1e-3


@pytest.mark.benchmarks
def test_reward_calls(bench):
  record = bench('reward_calls', '--responses=8', '--seconds=0.01', '--length=32', '--pairs=3')
  assert record['thread_judge_seconds'] > 0.01 and record['pairs_ms_per_response'] > 0


def test_compiled_names_what_is_missing(bench, monkeypatch, capsys):
  monkeypatch.setattr('segjax.plan.topologies.importlib.util.find_spec', lambda name: None)
  record = bench('compiled', '--model=small', '--topologies=cuda:8x8xH100-80GB')
  assert record['model'] == 'small' and record['batch'] == 128
  (topology,) = record['topologies']
  assert topology['topology'] == 'cuda:8x8xH100-80GB'
  assert "pip install -e '.[plan]'" in topology['missing']
  with pytest.raises(SystemExit):
    bench('compiled', '--topologies=v9:2x2')
  assert "topology 'v9:2x2' does not exist" in capsys.readouterr().err


@pytest.mark.benchmarks
def test_convert(bench, tmp_path):
  record = bench('convert', '--size=tiny', '--repeats=1', f'--directory={tmp_path}')
  assert record['benchmark'] == 'convert' and record['exact'] and record['within_limit']
  for direction in ('import', 'export'):
    assert record[direction]['percent_of_cp'] > 0 and record[direction]['anonymous_gb'] >= 0
    assert abs(sum(record[direction]['shares_percent'].values()) - 100) < 0.5
  assert record['sharded']['requested'] == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.benchmarks
def test_carry(bench):
  record = bench('carry', '--batch=32', '--concurrent=8,32', '--new=256', '--rollouts=6')
  for each in record['settings']:
    assert each['ratio'] > 1 and each['carrying']['slots_used'] > 0.9
    # A response is that many steps old on average, whatever the lengths.
    assert each['age_mean'] == pytest.approx(each['concurrent'] / 32, rel=0.25)
    # Prompts and tokens of carried responses are read again.
    assert each['carrying']['prefilled'] > each['waiting']['prefilled']


@pytest.mark.benchmarks
def test_decode(bench):
  record = bench(
    *('decode', '--shape=tiny', '--batches=2', '--prompt=4', '--new=18', '--ragged-new=20'),
    *('--repeats=1', '--static', '--roofline'),
  )
  assert record['benchmark'] == 'decode' and record['device'] == 'CPU'
  equal, ragged = record['tasks']
  assert equal['tokens'] == 36 and 16 <= ragged['tokens'] < 320
  assert equal['same_dynamic'] == equal['same_static'] == 2
  for task in record['tasks']:
    assert task['compiles'] == 0 and task['first_call_seconds'] > 0 and task['peak_gb'] > 0
    for name in ('segjax', 'dynamic', 'static'):
      assert task[name]['tokens_per_second'] > 0
  (roofline,) = record['roofline']
  assert roofline['batch'] == 2 and roofline['gb_per_second'] > 0


@pytest.mark.benchmarks
def test_decode_without_torch(bench, monkeypatch):
  """Only segjax is timed."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  record = bench(
    *('decode', '--shape=tiny', '--batches=1', '--prompt=4', '--new=4', '--repeats=1'),
    '--no-ragged',
  )
  (task,) = record['tasks']
  assert task['segjax']['relative_time'] == 1 and 'dynamic' not in task


@pytest.mark.benchmarks
def test_train(bench):
  record = bench('train', '--shape=tiny', '--batch=8', '--length=48', '--repeats=1')
  assert record['benchmark'] == 'train' and record['dtype'] == 'float32'
  assert record['compiles'] == 2  # with packing and without
  assert record['padded']['tokens'] == record['packed']['tokens'] < record['full']['tokens']
  assert 0 < record['packing_efficiency'] <= 1 and record['packing_speedup'] > 0


@pytest.mark.benchmarks
def test_train_against_another_checkout(bench):
  checkout = TOOL.parents[1]
  sizes = ('--shape=tiny', '--batch=8', '--length=48', '--repeats=1')
  record = bench('train', *sizes, f'--other={checkout}', '--rounds=1')
  assert set(record['times_as_fast']) == {'full', 'padded', 'packed'}
  assert record['other']['padded']['tokens'] == record['padded']['tokens']


@pytest.mark.benchmarks
def test_checkpoint_save(bench, tmp_path):
  record = bench('checkpoint_save', '--gigabytes=0.001', '--repeats=1', f'--directory={tmp_path}')
  assert 0 < record['blocked_seconds'] <= record['written_seconds']


@pytest.mark.benchmarks
def test_metric_log(bench):
  record = bench('metric_log', '--steps=200')
  assert record['metrics'] > 50 and record['microseconds'] > 0


@pytest.mark.benchmarks
def test_report(bench):
  record = bench('report', '--steps=20', '--responses=10', '--tokens=20', '--long=1')
  assert record['benchmark'] == 'report' and 0 < record['megabytes'] < 1
  assert record['write_seconds'] > 0 and (record['open_seconds'] or 1) > 0


@pytest.mark.benchmarks
@pytest.mark.parametrize('form, rows', [('pairs', 4000), ('steps', 6000)])
def test_data(bench, tmp_path, form, rows):
  record = bench('data', f'--rows={rows}', f'--form={form}', f'--directory={tmp_path}')
  assert record['rows'] == rows and record['same_batches']
  assert 0 < record['second_start']['seconds'] < record['first_start']['seconds']
  assert record['first_start']['peak_gb'] > 0
