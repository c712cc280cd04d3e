"""An HF checkpoint straight onto eight devices (2 x 4, forced on the CPU), as jobs load it.

In a process of its own: how often each byte is requested, and what memory is held beyond the
arrays. Writing the checkpoint is the caller's business.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

_INTERVAL = 0.005  # seconds between looks at the memory
_FLAG = '--xla_force_host_platform_device_count=8'


def measure(source: Path, dtype: str = '') -> dict:
  """Loads `source` in a new process.

  Args:
    dtype: of the parameters; '' keeps the file's.

  Returns:
    seconds; bytes of the files' tensors; requested, bytes asked for per byte there is; arrays,
    bytes of the buffers on the devices, replicated ones that share memory counted once; beyond,
    peak of anonymous bytes (RssAnon and RssShmem) above imports and arrays.
  """
  root = str(Path(__file__).resolve().parents[2])
  paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH', ''))))
  done = subprocess.run(
    [sys.executable, __file__, source, dtype],
    env=os.environ | {'PYTHONPATH': paths, 'XLA_FLAGS': _FLAG, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def _anonymous() -> int:
  fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
  return 1024 * sum(int(fields[key].split()[0]) for key in ('RssAnon', 'RssShmem'))


def _child(source: str, dtype: str) -> None:
  import jax
  import jax.numpy as jnp

  from segjax.hf import reader
  from segjax.model.mesh import make_mesh

  mesh = make_mesh(1, 2, 4)
  jnp.zeros(1).block_until_ready()
  readers, original = [], reader.SliceReader
  reader.SliceReader = lambda checkpoint: readers.append(original(checkpoint)) or readers[-1]
  base = peak = _anonymous()
  done = threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(_INTERVAL):
      peak = max(peak, _anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  begun = time.perf_counter()
  config = reader.load_config(source)
  params = jax.block_until_ready(reader.load_params(source, config, 'language', mesh, dtype=dtype))
  seconds = time.perf_counter() - begun
  peak = max(peak, _anonymous())
  done.set()
  watcher.join()
  shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
  arrays = sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())
  num_bytes = sum(t.num_bytes for t in reader.open_checkpoint(source).tensors.values())
  found = {
    'seconds': round(seconds, 2),
    'bytes': num_bytes,
    'requested': readers[0].requested / num_bytes,
    'arrays': arrays,
    'beyond': peak - base - arrays,
  }
  print(json.dumps(found))


if __name__ == '__main__':
  _child(*sys.argv[1:])
