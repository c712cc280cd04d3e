"""Measures the loading of an HF checkpoint onto eight devices (2 x 4, forced on the CPU).

It runs in a process of its own, and counts how often each byte is requested and how much memory is
allocated in addition to the arrays. The caller writes the checkpoint.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

_INTERVAL = 0.005  # seconds between two samples of the memory
_FLAG = '--xla_force_host_platform_device_count=8'


def measure(source: Path, dtype: str = '') -> dict:
  """Loads a checkpoint in a new process.

  Args:
    source: directory of the checkpoint.
    dtype: dtype of the parameters; '' keeps that of the files.

  Returns:
    `seconds`; `bytes` of the files' tensors; `requested`, bytes read per byte of the files;
    `arrays`, bytes of the buffers on the devices, where replicas that share memory count once;
    `beyond`, peak of anonymous bytes (RssAnon and RssShmem) in addition to imports and arrays.
  """
  root = str(Path(__file__).resolve().parents[2])
  paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH', ''))))
  process = subprocess.run(
    [sys.executable, __file__, source, dtype],
    env=os.environ | {'PYTHONPATH': paths, 'XLA_FLAGS': _FLAG, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(process.stdout.splitlines()[-1])


def _anonymous() -> int:
  """Returns the anonymous bytes of this process."""
  fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
  return 1024 * sum(int(fields[key].split()[0]) for key in ('RssAnon', 'RssShmem'))


def _child(source: str, dtype: str) -> None:
  """Loads the checkpoint and prints the record of `measure` as JSON."""
  import jax
  import jax.numpy as jnp

  from segjax.hf import placement, reader
  from segjax.model.mesh import make_mesh

  mesh = make_mesh(1, 2, 4)
  jnp.zeros(1).block_until_ready()
  readers, make_reader = [], placement.SliceReader
  placement.SliceReader = lambda files: readers.append(make_reader(files)) or readers[-1]
  base = peak = _anonymous()
  done = threading.Event()

  def sample() -> None:
    nonlocal peak
    while not done.wait(_INTERVAL):
      peak = max(peak, _anonymous())

  sampler = threading.Thread(target=sample)
  sampler.start()
  begin = time.perf_counter()
  config = reader.load_config(source)
  params = jax.block_until_ready(reader.load_params(source, config, 'language', mesh, dtype=dtype))
  seconds = time.perf_counter() - begin
  peak = max(peak, _anonymous())
  done.set()
  sampler.join()
  shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
  arrays = sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())
  num_bytes = sum(t.num_bytes for t in reader.open_checkpoint(source).tensors.values())
  record = {
    'seconds': round(seconds, 2),
    'bytes': num_bytes,
    'requested': readers[0].requested / num_bytes,
    'arrays': arrays,
    'beyond': peak - base - arrays,
  }
  print(json.dumps(record))


if __name__ == '__main__':
  _child(*sys.argv[1:])
