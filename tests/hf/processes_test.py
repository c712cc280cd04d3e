import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf import tiny

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import jax
address, rank, source, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from segjax.hf import reader, writer
from segjax.model import sharding
mesh = sharding.make_mesh(2, 2, 2)
config = reader.load_config(source)
params = reader.load_params(source, config, 'language', mesh)
assert not params['lm_head']['kernel'].is_fully_addressable
writer.save_checkpoint(out, params, config, 'language', source=source, max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
  source = tiny.write(tmp_path / 'a', 'biases')
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  command = [sys.executable, '-c', WORKER, address]
  workers = [
    subprocess.Popen([*command, str(rank), source, tmp_path / 'b'], cwd=REPOSITORY, env=env)
    for rank in range(2)
  ]
  try:
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
  finally:
    for worker in workers:
      worker.kill()
  tiny.assert_same_tensors(source, tmp_path / 'b')
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b']
