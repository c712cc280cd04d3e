"""The benchmarks run; how fast they are is no matter of tests."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'bench.py'


@pytest.fixture
def bench(monkeypatch, capsys):
  """Runs the tool and reads its last line."""
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


def test_convert(bench, tmp_path):
  record = bench('convert', '--size=tiny', '--repeats=1', f'--directory={tmp_path}')
  assert record['benchmark'] == 'convert' and record['exact'] and record['within_limit']
  for what in ('import', 'export'):
    assert record[what]['percent_of_cp'] > 0 and record[what]['anonymous_gb'] >= 0
    assert abs(sum(record[what]['shares_percent'].values()) - 100) < 0.5
  assert record['sharded']['requested'] == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
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
    for name in ('ours', 'dynamic', 'static'):
      assert task[name]['tokens_per_second'] > 0
  (roofline,) = record['roofline']
  assert roofline['batch'] == 2 and roofline['gb_per_second'] > 0


def test_decode_without_torch(bench, monkeypatch):
  """Ours alone, and a line that says so."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  record = bench(
    *('decode', '--shape=tiny', '--batches=1', '--prompt=4', '--new=4', '--repeats=1'),
    '--no-ragged',
  )
  (task,) = record['tasks']
  assert task['ours']['times_as_long'] == 1 and 'dynamic' not in task


def test_train(bench):
  record = bench('train', '--shape=tiny', '--batch=8', '--length=48', '--repeats=1')
  assert record['benchmark'] == 'train' and record['dtype'] == 'float32'
  assert record['compiles'] == 2  # with packing and without
  assert record['padded']['tokens'] == record['packed']['tokens'] < record['full']['tokens']
  assert 0 < record['fill'] <= 1 and record['packing_saves'] > 0


def test_saving(bench, tmp_path):
  record = bench('checkpoint_save', '--gigabytes=0.001', '--repeats=1', f'--directory={tmp_path}')
  assert 0 < record['blocked_seconds'] <= record['written_seconds']


def test_logs(bench):
  record = bench('metric_log', '--steps=200')
  assert record['metrics'] > 50 and record['microseconds'] > 0


def test_report(bench):
  record = bench('report', '--steps=20', '--responses=10', '--tokens=20', '--long=1')
  assert record['benchmark'] == 'report' and 0 < record['megabytes'] < 1
  assert record['write_seconds'] > 0 and (record['open_seconds'] or 1) > 0
