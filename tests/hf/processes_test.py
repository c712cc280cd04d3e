import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import hf_models

from segjax.hf import convert

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import jax
address, rank, source, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from segjax.hf import reader, writer
from segjax.model.mesh import make_mesh
mesh = make_mesh(2, 2, 2)
config = reader.load_config(source)
params = reader.load_params(source, config, 'language', mesh)
assert not params['lm_head']['kernel'].is_fully_addressable
writer.save_checkpoint(out, params, config, 'language', source=source, max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
  source = hf_models.write(tmp_path / 'a', 'biases')
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
  hf_models.assert_same_tensors(source, tmp_path / 'b')
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b']


KILLED = """
import sys, time
from segjax.hf import convert, shards, tensor_slices
what, source, out = sys.argv[1:]

def slow(function, done=[]):
  def wrapper(*args, **kwargs):
    done.append(1)
    if len(done) > 10:
      print('writing', flush=True)
      time.sleep(600)
    return function(*args, **kwargs)
  return wrapper

tensor_slices.SliceReader.read = slow(tensor_slices.SliceReader.read)
shards.ShardWriter.write = slow(shards.ShardWriter.write)
if what == 'import':
  convert.import_checkpoint(source, out, piece_bytes=2000)
else:
  convert.export_checkpoint(source, out)
"""


def test_a_killed_conversion_leaves_no_checkpoint(tmp_path):
  source = hf_models.write(tmp_path / 'a', max_shard_size='20KB')
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  outs = {'import': tmp_path / 'i' / 'out', 'export': tmp_path / 'e' / 'out'}
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', KILLED, what, source if what == 'import' else stored, out],
      **{'cwd': REPOSITORY, 'stdout': subprocess.PIPE, 'text': True},
    )
    for what, out in outs.items()
  ]
  try:
    # Several threads may print at once, on one line.
    assert all(worker.stdout.readline().startswith('writing') for worker in workers)
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.wait(60) for worker in workers] == [-signal.SIGKILL] * 2
  for what, out in outs.items():
    (left,) = out.parent.iterdir()
    assert left.name.startswith('.out.partial-')
    assert not (left / 'config.json').exists() and not (left / 'segjax.json').exists()
    with pytest.raises(ValueError, match=r'no segjax\.json'):
      convert.export_checkpoint(left, tmp_path / 'c')
    # The next run to the same path removes the leftovers.
    if what == 'import':
      convert.import_checkpoint(source, out)
    else:
      convert.export_checkpoint(stored, out)
      hf_models.assert_same_tensors(source, out)
    assert list(out.parent.iterdir()) == [out]
    shutil.rmtree(out)
