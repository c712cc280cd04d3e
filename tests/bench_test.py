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
