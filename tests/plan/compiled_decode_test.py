"""Decode programs as the compilers for H100 and TPU make them: what a step copies and moves."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled
BENCH = Path(__file__).resolve().parents[2] / 'tools' / 'bench.py'


@functools.cache
def measured(topology, *flags):
  """Returns the record of `tools/bench.py compiled`; skips the test where there is no compiler."""
  command = [sys.executable, str(BENCH), 'compiled', '--phases=decode', *flags]
  command.append(f'--topologies={topology}')
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  (record,) = json.loads(done.stdout.splitlines()[-1])['topologies']
  if 'missing' in record:
    pytest.skip(record['missing'])
  return record


def exchanged(record, kind):
  return sum(c['bytes'] for c in record['collectives'] if c['kind'] == kind)


def test_llama3_8b_on_an_h100():
  """128 rows of 460 positions: weights and live positions are read once, and nothing is copied."""
  record = measured('cuda:1xH100-80GB')
  assert record['attention'] == 'triton' and record['programs'] <= 8
  assert record['copied_bytes'] == 0 and record['collectives'] == []
  weights = 2 * (8.03e9 - 128256 * 4096)  # of the embedding a row per token is read
  positions = 128 * 460 * 32 * 2 * 8 * 128 * 2
  assert weights + positions < record['moved_bytes'] < 24e9
  # No second set of pages, whatever their number: 32 GiB here.
  assert max(record['temporaries'].values()) < 2**30


def test_int8_layers_are_read_as_int8():
  """Half of the bytes of the layers' matrices, and no copy of them in bfloat16."""
  layers = 4
  flags = ('cuda:1xH100-80GB', f'--layers={layers}')
  wide, narrow = measured(*flags), measured(*flags, '--weights=int8')
  assert narrow['copied_bytes'] == 0
  matrices = layers * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
  assert wide['moved_bytes'] - narrow['moved_bytes'] == pytest.approx(matrices, rel=0.01)


def test_no_layer_waits_for_the_host():
  """Of a chunk of steps the loop over steps alone; a step reads its condition once."""
  record = measured('cuda:1xH100-80GB', '--layers=4')
  waits = record['host_waits']
  assert waits['prefill'] == 0 and waits['page copies'] == 0
  assert waits['decode chunk'] == 1


SLICES = ('cuda:8xH100-80GB', 'v5p:2x2x2', 'v5e:8x8')


@pytest.mark.parametrize('topology', SLICES)
def test_several_devices_gather_no_weight(topology):
  """Heads over eight devices; rows over what is left."""
  layers = 4
  record = measured(topology, f'--layers={layers}')
  assert record['mesh']['tensor'] == 8 and record['programs'] <= 8
  assert record['copied_bytes'] == 0
  # After attention and after the MLP activations are added up, after the embedding too.
  sums = next(c for c in record['collectives'] if c['kind'] == 'all-reduce')
  assert 2 * layers + 1 <= sums['number'] <= 2 * layers + 3
  assert exchanged(record, 'all-reduce') < 1.1 * (2 * layers + 1) * 128 * 4096 * 2
  # The logits of a device's own rows; the smallest matrix of a layer has 8 MiB.
  assert exchanged(record, 'all-to-all') < 1.1 * 128 * 128256 * 4 / 8
  assert exchanged(record, 'all-gather') < 2**20


def test_llama3_70b_on_eight_nodes_exchanges_within_nodes():
  record = measured('cuda:8x8xH100-80GB', '--model=70b', '--layers=4')
  assert record['mesh'] == {'data': 8, 'fsdp': 1, 'tensor': 8}
  assert record['collectives'] and record['copied_bytes'] == 0
  assert [c for c in record['collectives'] if c['crosses_nodes']] == []
