"""Several processes on one machine: they meet, agree, and end as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segjax import processes, rendezvous
from segjax.data.batches import batch_indices

REPOSITORY = Path(__file__).resolve().parents[1]
_QUICK = '--xla_backend_optimization_level=0'  # compiling is most of the time
_SMALL = {
  'demo.sft_rows': 64,
  'demo.pairs': 64,
  'network.max_position_embeddings': 64,
  'sft.max_steps': 6,
  'sft.batch_size': 8,
  'checkpoint.every_steps': 1,
}


def _port():
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def _start(workdir, number, *more):
  """So many processes of one run, their output in files beside the working directory."""
  port, environment = _port(), os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': _QUICK}
  started = []
  for index in range(number):
    flags = [f'--config.{key}={value}' for key, value in _SMALL.items()]
    if number > 1:
      flags += [f'--coordinator=localhost:{port}', f'--num_processes={number}']
      flags += [f'--process_id={index}']
    command = [sys.executable, '-m', 'segjax.main', '--config=configs/ppo.py']
    with Path(f'{workdir}.{index}').open('w') as out:
      started.append(
        subprocess.Popen(
          [*command, f'--workdir={workdir}', '--config.stages=demo,sft', *flags, *more],
          stdout=out,
          stderr=subprocess.STDOUT,
          cwd=REPOSITORY,
          env=environment,
        )
      )
  return started


def _end(started, timeout=240):
  try:
    return [process.wait(timeout) for process in started]
  finally:
    for process in started:
      process.kill()


def _losses(workdir):
  lines = (workdir / 'sft' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['train/loss'] for line in lines]


def _saved(workdir):
  place = workdir / 'sft' / 'checkpoints'
  return [int(p.name) for p in place.iterdir() if p.name.isdecimal()] if place.is_dir() else []


def _wait_for_a_save(workdir):
  end = time.monotonic() + 200
  while not _saved(workdir):
    assert time.monotonic() < end, Path(f'{workdir}.0').read_text()[-2000:]
    time.sleep(0.05)


def test_two_end_as_one_and_a_signal_to_one_stops_both(tmp_path):
  assert _end(_start(tmp_path / 'one', 1)) == [0]
  started = _start(tmp_path / 'two', 2)
  _wait_for_a_save(tmp_path / 'two')
  started[1].send_signal(signal.SIGTERM)
  codes = _end(started)
  out = Path(f'{tmp_path}/two.0').read_text()
  assert codes == [75, 75], out[-3000:]
  step = max(_saved(tmp_path / 'two'))
  assert f'step {step} of 6 is saved' in out
  assert _end(_start(tmp_path / 'two', 2)) == [0, 0]
  assert f'resuming from step {step} of 6' in Path(f'{tmp_path}/two.0').read_text()
  assert _losses(tmp_path / 'two') == pytest.approx(_losses(tmp_path / 'one'), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('number, lost', [(2, 1), (4, 3), (2, 0)])
def test_all_stop_where_one_is_killed_and_go_on_bit_for_bit(tmp_path, number, lost):
  assert _end(_start(tmp_path / 'whole', number)) == [0] * number
  started = _start(tmp_path / 'killed', number)
  _wait_for_a_save(tmp_path / 'killed')
  started[lost].kill()
  begun = time.monotonic()
  assert all(_end(started))
  assert time.monotonic() - begun < 60
  for index in set(range(number)) - {lost}:
    out = Path(f'{tmp_path}/killed.{index}').read_text()
    assert f'process {lost} (pid {started[lost].pid} on' in out, out[-3000:]
  assert _end(_start(tmp_path / 'killed', number)) == [0] * number
  assert _losses(tmp_path / 'killed') == _losses(tmp_path / 'whole')
  weights = [tmp_path / name / 'sft/model/model.safetensors' for name in ('killed', 'whole')]
  assert weights[0].read_bytes() == weights[1].read_bytes()


_ROWS = """
import json, sys
import jax, numpy as np
from segjax import processes
from segjax.data.batches import batch_indices
from segjax.model.mesh import make_mesh
from segjax.model.sharding import place_batch
processes.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 60)
mesh, found = make_mesh(data=jax.device_count()), []
for step in range(4):
  placed = place_batch(batch_indices(16, 8, 0, step), mesh)
  found.append([[s.index[0].start or 0, s.data.tolist()] for s in placed.addressable_shards])
print(json.dumps(found))
"""


def _rows(number):
  """Of every step, what each process holds: (where in the batch it begins, rows)."""
  address, environment = f'localhost:{_port()}', os.environ | {'XLA_FLAGS': _QUICK}
  started = [
    subprocess.Popen(
      [sys.executable, '-c', _ROWS, address if number > 1 else '', str(number), str(index)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=REPOSITORY,
      env=environment,
    )
    for index in range(number)
  ]
  outs = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
  return [[shard for out in outs for shard in out[step]] for step in range(4)]


@pytest.mark.parametrize('number', [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_hold_disjoint_rows_in_one_order(number):
  """However many there are, a step is the same rows, each held once; an epoch is each row once."""
  held = _rows(number)
  for step, shards in enumerate(held):
    assert len(shards) == number and {len(rows) for _, rows in shards} == {8 // number}
    joined = [row for _, rows in sorted(shards) for row in rows]
    assert joined == batch_indices(16, 8, 0, step).tolist()
  for first in (0, 2):
    epoch = [row for shards in held[first : first + 2] for _, rows in shards for row in rows]
    assert sorted(epoch) == list(range(16))


def _meet(indices, number, timeout=1.0):
  """What each of the processes is told: None where all came."""
  address = f'localhost:{_port()}'

  def one(index):
    try:
      return rendezvous.meet(address, number, index, timeout)
    except ValueError as error:
      return str(error)

  with ThreadPoolExecutor(len(indices)) as pool:
    return list(pool.map(one, indices))


def test_all_come():
  assert _meet([0, 1, 2], 3, timeout=20) == [None] * 3


def test_those_that_do_not_come_are_named():
  for text in _meet([0, 2], 4):
    assert text.startswith('process 1, 3 of 4 did not come within 1 s')
  assert 'process 0 did not answer at localhost:' in _meet([1], 2)[0]


@pytest.mark.parametrize(
  'address, number, index, message',
  [
    ('here', 2, 0, '--coordinator=here must be host:port'),
    ('here:1', 2, 2, 'needs --num_processes=N and --process_id=0 to N-1; found 2 and 2'),
    ('here:1', 0, -1, 'found 0 and -1'),
  ],
)
def test_wrong_flags(address, number, index, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(address, number, index)


def test_the_script_of_a_slurm_job_is_alone(monkeypatch):
  """Only what srun starts has a step; anything else would wait for processes that never come."""
  monkeypatch.setenv('SLURM_NTASKS', '4')
  monkeypatch.delenv('SLURM_STEP_NODELIST', raising=False)
  processes.initialize()
  assert processes.process_count() == 1


def test_one_process_needs_nobody(tmp_path):
  processes.initialize()
  processes.barrier('alone')
  processes.check_shared_filesystem(tmp_path)
  assert processes.is_first() and processes.process_count() == 1
  assert processes.broadcast_from_first({'a': [1, None]}) == {'a': [1, None]}
  assert processes.any_process(True) and not processes.any_process(False)
