"""Pages that a process faults in again after it has freed them."""

import os
import subprocess
import sys

import pytest

from segjax import heap

_PROGRAM = """
import resource, sys, threading
from segjax import heap

def fill():
  b'1' * (100 << 20)  # more than an arena of a thread holds

def faults_of_a_thread():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=fill)
  thread.start()
  thread.join()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == 'keep':
  heap.keep_freed_memory()
faults_of_a_thread()
print(faults_of_a_thread() * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the parameters are those of glibc')
@pytest.mark.parametrize('kept, bounds', [('keep', (0, 10)), ('free', (90, 110))])
def test_memory_of_threads_is_kept(kept, bounds):
  """Measures the MiB that fault in when 100 MiB are allocated for the second time."""
  process = subprocess.run(
    [sys.executable, '-c', _PROGRAM, kept], capture_output=True, text=True, check=True
  )
  low, high = bounds
  assert low <= int(process.stdout) <= high


@pytest.mark.parametrize(
  'chosen, expected',
  [
    ({}, {'XLA_CLIENT_MEM_FRACTION': '0.92'}),
    ({'XLA_CLIENT_MEM_FRACTION': '.5'}, {'XLA_CLIENT_MEM_FRACTION': '.5'}),
    ({'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}, {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}),
  ],
)
def test_runs_take_the_memory_that_plans_count_on(chosen, expected):
  """jax refuses both names at once."""
  names = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'
  with pytest.MonkeyPatch.context() as patch:
    for name in names:
      patch.delenv(name, raising=False)
    for name, value in chosen.items():
      patch.setenv(name, value)
    heap.take_gpu_memory()
    found = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.pop('XLA_CLIENT_MEM_FRACTION', None)
  assert found == expected
