"""The benchmarks run; how fast they are is no matter of tests."""

import json
import runpy
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'bench.py'


def test_rewards(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['bench.py', 'rewards', '--batch=4', '--length=16'])
  runpy.run_path(str(TOOL), run_name='__main__')
  *_, last = capsys.readouterr().out.splitlines()
  record = json.loads(last)
  assert record['benchmark'] == 'rewards' and record['batch'] == 4 and record['length'] == 16
  assert record['milliseconds'] > 0 and record['ratio'] > 0
  assert record['largest_difference'] < 1e-3
