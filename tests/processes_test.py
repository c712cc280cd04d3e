"""Several processes on one machine join, agree on values, and give the results of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segjax import lost_peers, processes
from segjax.data.batches import batch_indices
from segjax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
_NO_OPTIMIZATION = '--xla_backend_optimization_level=0'  # compiling is most of the time
_SMALL = {
  'demo.sft_rows': 64,
  'demo.pairs': 64,
  'network.max_position_embeddings': 64,
  'sft.max_steps': 6,
  'sft.batch_size': 8,
  'checkpoint.every_steps': 1,
}


def _free_port():
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def _start(workdir, number, *flags, stages='demo,sft'):
  """Starts all processes of one run; their output goes to files next to the working directory."""
  port = _free_port()
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': _NO_OPTIMIZATION}
  flags = [*(f'--config.{key}={value}' for key, value in _SMALL.items()), *flags]
  command = [sys.executable, '-m', 'segjax.main', '--config=configs/ppo.py']
  command += [f'--workdir={workdir}', f'--config.stages={stages}', *flags]
  if number > 1:
    command += [f'--coordinator=localhost:{port}', f'--num_processes={number}']
  workers = []
  for index in range(number):
    with Path(f'{workdir}.{index}').open('w') as out:
      workers.append(
        subprocess.Popen(
          [*command, *([f'--process_id={index}'] if number > 1 else [])],
          stdout=out,
          stderr=subprocess.STDOUT,
          cwd=REPOSITORY,
          env=environment,
        )
      )
  return workers


def _wait(workers, timeout=240):
  """Returns the exit codes."""
  try:
    return [worker.wait(timeout) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()


def _output(workdir, index):
  return Path(f'{workdir}.{index}').read_text()


def _losses(workdir):
  lines = (workdir / 'sft' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['sft/loss'] for line in lines]


def _saved_steps(workdir, stage='sft'):
  directory = workdir / stage / 'checkpoints'
  names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
  return [int(name) for name in names if name.isdecimal()]


def _wait_for_a_checkpoint(workdir, stage='sft'):
  end = time.monotonic() + 200
  while not _saved_steps(workdir, stage):
    assert time.monotonic() < end, _output(workdir, 0)[-2000:]
    time.sleep(0.05)


@pytest.mark.processes
def test_two_processes_equal_one_and_a_signal_to_one_stops_both(tmp_path):
  assert _wait(_start(tmp_path / 'one', 1)) == [0]
  workers = _start(tmp_path / 'two', 2)
  _wait_for_a_checkpoint(tmp_path / 'two')
  workers[1].send_signal(signal.SIGTERM)
  codes = _wait(workers)
  output = _output(tmp_path / 'two', 0)
  assert codes == [75, 75], output[-3000:]
  step = max(_saved_steps(tmp_path / 'two'))
  assert f'step {step} of 6 is saved' in output
  assert _wait(_start(tmp_path / 'two', 2)) == [0, 0]
  assert f'resuming from step {step} of 6' in _output(tmp_path / 'two', 0)
  assert _losses(tmp_path / 'two') == pytest.approx(_losses(tmp_path / 'one'), rel=1e-5)


_ROLLOUTS = {
  'network.hidden_size': 16,
  'network.num_hidden_layers': 1,
  'data.max_length': 60,
  'data.max_prompt_length': 32,
  'rollout.max_new_tokens': 28,  # in two chunks
  'ppo.max_steps': 4,
  'ppo.rollout_batch_size': 8,
  'ppo.minibatch_size': 4,
  'ppo.micro_batch_size': 2,
  'ppo.packing_length': 64,
  'rollout.recompute_logprob': True,
  'ppo.eval_every': 10,
  'reward_shaping.reward_fn': 'segjax.data.demo_language:gold',
  'reward_shaping.reward_model_weight': 0.0,
}


def _ppo_metrics(workdir):
  lines = (workdir / 'ppo' / 'metrics.jsonl').read_text().splitlines()
  every = [json.loads(line) for line in lines]
  return [{k: v for k, v in m.items() if not k.startswith(('timing/', 'perf/'))} for m in every]


@pytest.mark.processes
def test_a_signal_to_one_process_ends_the_rollout_of_both(tmp_path):
  """The flag comes back with the tokens of a chunk; the run that goes on is as if none had come."""
  flags = [f'--config.{key}={value}' for key, value in _ROLLOUTS.items()]
  uninterrupted, stopped = tmp_path / 'uninterrupted', tmp_path / 'stopped'
  assert _wait(_start(uninterrupted, 2, *flags, stages='demo,ppo')) == [0, 0]
  workers = _start(stopped, 2, *flags, stages='demo,ppo')
  _wait_for_a_checkpoint(stopped, 'ppo')
  workers[1].send_signal(signal.SIGTERM)
  codes = _wait(workers)
  assert codes == [75, 75], _output(stopped, 0)[-3000:]
  step = max(_saved_steps(stopped, 'ppo'))
  for index in range(2):
    assert f'ppo stopped by a signal: step {step} of 4 is saved' in _output(stopped, index)
  assert len(_ppo_metrics(stopped)) == step
  assert _wait(_start(stopped, 2, *flags, stages='demo,ppo')) == [0, 0]
  assert _ppo_metrics(stopped) == _ppo_metrics(uninterrupted)
  # Rows are scored as they are trained, whichever process has them.
  assert all(m['policy/initial_ratio_deviation'] < 1e-6 for m in _ppo_metrics(stopped))


@pytest.mark.processes
@pytest.mark.parametrize('number, lost', [(2, 1), (4, 3), (2, 0)])
def test_all_exit_when_one_is_killed_and_resume_bit_for_bit(tmp_path, number, lost):
  uninterrupted, killed = tmp_path / 'uninterrupted', tmp_path / 'killed'
  assert _wait(_start(uninterrupted, number)) == [0] * number
  workers = _start(killed, number)
  _wait_for_a_checkpoint(killed)
  workers[lost].kill()
  begin = time.monotonic()
  assert all(_wait(workers))
  assert time.monotonic() - begin < 60
  for index in set(range(number)) - {lost}:
    output = _output(killed, index)
    assert f'segjax: lost process {lost}; restart all' in output, output[-3000:]
    assert 'stack trace' not in output
  assert _wait(_start(killed, number)) == [0] * number
  assert _losses(killed) == _losses(uninterrupted)
  first, second = (run / 'sft/model/model.safetensors' for run in (killed, uninterrupted))
  assert first.read_bytes() == second.read_bytes()


_JOIN = """
import sys
from absl import flags
from segjax import main, processes
from segjax.config import command_line
from segjax.errors import UserError
address, number, index, failing = sys.argv[1], *map(int, sys.argv[2:])
def run(_):
  processes.initialize(address, number, index, 10)
  if index == failing:
    raise UserError('not a directory.')
  processes.barrier('end')
command_line.parse_flags = lambda arguments: flags.FLAGS(arguments[:1])
main.run(run)
"""


def _join(number, indices, failing=-1):
  """Starts the processes `indices` of `number`; returns the lines of segjax in their output."""
  address = f'localhost:{_free_port()}'
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', _JOIN, address, str(number), str(index), str(failing)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=REPOSITORY,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': _NO_OPTIMIZATION},
    )
    for index in indices
  ]
  outputs = [worker.communicate(timeout=120)[0] for worker in workers]
  assert all(worker.returncode for worker in workers)
  assert not any('stack trace' in output for output in outputs)
  return [
    [line for line in output.splitlines() if line.startswith('segjax: ')] for output in outputs
  ]


@pytest.mark.processes
def test_processes_that_do_not_join_are_named():
  line = (
    'segjax: processes 1, 3 did not join within 10 s (--join_timeout); start one process for '
    'each index from 0.'
  )
  assert _join(4, [0, 2]) == [[line], [line]]
  ((line,),) = _join(2, [1])
  assert line.startswith('segjax: process 0 did not answer within 10 s (--join_timeout); check')


@pytest.mark.processes
@pytest.mark.parametrize('failing', [0, 1])
def test_a_user_error_of_one_process_is_one_line_in_each(failing):
  lines = _join(2, [0, 1], failing)
  assert lines[failing] == ['segjax: not a directory.']
  assert lines[1 - failing] == [
    f'segjax: process {failing} failed; see its output, then restart all processes to resume from '
    'the last checkpoint.'
  ]


_FATAL = (
  'F1125 23:16:04.633624 5149 client.h:80] Terminating process because the JAX distributed service '
  'detected fatal errors. absl::Status: '
)
_SHUTDOWN = """INTERNAL: Shutdown barrier has failed.
Barrier result: 'DEADLINE_EXCEEDED: Barrier timed out. Id: Shutdown::14355::0. This usually happens
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 1. Some timed out task names:
0
2
"""


@pytest.mark.parametrize(
  'status, sentence',
  [
    (
      'DEADLINE_EXCEEDED\nRPC: /x.CoordinationService/RegisterTask\n',
      'process 0 did not answer',
    ),
    (
      'Barrier timed out. Some timed out task names:\n3\n1\n\nRPC: /x/RegisterTask\n',
      'processes 1, 3 did not join within 5 s',
    ),
    ('UNAVAILABLE: tasks (stopped sending heartbeats):\n2\nThe tasks have', 'lost process 2; re'),
    ('UNAVAILABLE: Failed to send RPC to coordination service.', 'lost process 0; restart all'),
    (_SHUTDOWN, 'process 1 failed; see its output, then restart all processes'),
  ],
  ids=['no coordinator', 'missing', 'lost', 'coordinator lost', 'failed'],
)
def test_why_jax_aborted(status, sentence):
  assert sentence in lost_peers.explain(_FATAL + status, '5 s')


def test_stderr_is_copied_and_an_abort_is_one_line():
  log = 'a warning\nE1125 23:16:04.6 5 coordination_service_agent.cc:289] Polled an error\n'
  outputs = [
    subprocess.run(
      [sys.executable, '-m', 'segjax.lost_peers', '5 s'],
      input=text,
      capture_output=True,
      text=True,
      cwd=REPOSITORY,
    ).stderr
    for text in (log, f'{log}{_FATAL}UNAVAILABLE\n*** Check failure stack trace: ***\n')
  ]
  line = 'segjax: lost process 0; restart all processes to resume from the last checkpoint.\n'
  assert outputs == [log, f'a warning\n{line}']


_ROWS = """
import json, sys
import jax, numpy as np
from segjax import processes
from segjax.data.batches import batch_indices
from segjax.model.agreement import StepAgreement
from segjax.model.mesh import make_mesh
from segjax.model.sharding import place_batch
processes.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 60)
mesh, steps = make_mesh(data=jax.device_count()), []
for step in range(4):
  batch = place_batch(batch_indices(16, 8, 0, step), mesh)
  steps.append([[s.index[0].start or 0, s.data.tolist()] for s in batch.addressable_shards])
# The flags of a step come a step late, from any process; those of one process at once.
agree = StepAgreement(mesh)
last = processes.process_index() == int(sys.argv[2]) - 1
agreed = [agree(last and step == 1, False) for step in range(4)]
assert agreed == [(step == 1 + (int(sys.argv[2]) > 1), False) for step in range(4)], agreed
# Not a float32; the first process has the largest.
assert processes.smallest(1e9 + 0.1 - processes.process_index()) == 1e9 + 1.1 - int(sys.argv[2])
print(json.dumps(steps))
"""


def _rows(number):
  """Returns for every step the shards of all processes: (first row in the batch, row indices)."""
  address = f'localhost:{_free_port()}' if number > 1 else ''
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', _ROWS, address, str(number), str(index)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=REPOSITORY,
      env=os.environ | {'XLA_FLAGS': _NO_OPTIMIZATION},
    )
    for index in range(number)
  ]
  outputs = [worker.communicate(timeout=120)[0].splitlines()[-1] for worker in workers]
  steps = zip(*map(json.loads, outputs), strict=True)
  return [[shard for shards in step for shard in shards] for step in steps]


@pytest.mark.processes
@pytest.mark.parametrize('number', [1, 2, 4])
def test_processes_hold_disjoint_rows_in_one_order(number):
  """The rows of a step do not depend on the number of processes; an epoch is each row once."""
  steps = _rows(number)
  for step, shards in enumerate(steps):
    assert len(shards) == number and {len(rows) for _, rows in shards} == {8 // number}
    batch = [row for _, rows in sorted(shards) for row in rows]
    assert batch == batch_indices(16, 8, 0, step).tolist()
  for first in (0, 2):
    epoch = [row for shards in steps[first : first + 2] for _, rows in shards for row in rows]
    assert sorted(epoch) == list(range(16))


@pytest.mark.parametrize(
  'address, number, index, message',
  [
    ('here', 2, 0, '--coordinator=here must be host:port'),
    ('here:1', 2, 2, 'needs --num_processes=N and --process_id=0 to N-1; found 2 and 2'),
    ('here:1', 0, -1, 'found 0 and -1'),
  ],
)
def test_wrong_flags(address, number, index, message):
  with pytest.raises(UserError, match=message):
    processes.initialize(address, number, index)


def test_a_slurm_batch_script_is_one_process(monkeypatch):
  """Only srun sets the step; a batch script would wait for processes that never start."""
  monkeypatch.setenv('SLURM_NTASKS', '4')
  monkeypatch.delenv('SLURM_STEP_NODELIST', raising=False)
  processes.initialize()
  assert processes.process_count() == 1


def test_one_process_communicates_nothing(tmp_path):
  processes.initialize()
  processes.barrier('alone')
  processes.check_shared_filesystem(tmp_path)
  assert processes.is_first() and processes.process_count() == 1
  assert processes.broadcast_from_first({'a': [1, None]}) == {'a': [1, None]}
  assert processes.any_process(True) and not processes.any_process(False)
