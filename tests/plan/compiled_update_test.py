"""Updates and scoring as the H100 compiler makes them: what the benchmark counts in them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled
BENCH = Path(__file__).resolve().parents[2] / 'tools' / 'bench.py'
DEVICES, PEAK = 8, 989e12


@functools.cache
def measured(phase):
  """Returns what `tools/bench.py compiled` says of a phase; skips where there is no compiler."""
  command = [sys.executable, str(BENCH), 'compiled', '--model=small', f'--phases={phase}']
  command.append('--topologies=cuda:8xH100-80GB')
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  (record,) = json.loads(done.stdout.splitlines()[-1])['topologies']
  if 'missing' in record:
    pytest.skip(record['missing'])
  return record['updates'][0]


def test_an_update_computes_what_the_network_needs():
  update = measured('policy-update')
  assert update['phase'] == 'policy update' and 7 < update['calls'] < 9
  model = update['mfu'] * update['seconds'] * PEAK
  # Beside three forward passes: padding below 10 %, and products that are computed twice.
  assert 1.05 < update['flops'] / model < 1.6
  assert 0 < update['attention_flops'] < 0.3 * update['flops']
  assert 0 < update['exposed'] <= update['exchange_seconds'] < update['seconds']
  # Weights and states are read and written, and each layer's matrices gathered three times.
  parameters = 4 * (4 * 1024**2 + 3 * 1024 * 2048) + 2 * 4096 * 1024
  assert update['exchanged'] > update['calls'] * 3 * 2 * parameters * 0.8
  assert update['bytes'] > update['calls'] * parameters * 12 / DEVICES


def test_scoring_is_one_pass_of_four_networks():
  scoring = measured('scoring')
  assert scoring['mfu'] == 0 and scoring['flops'] > 0 and 0 <= scoring['hidden'] <= 1
