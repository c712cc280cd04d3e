"""What a process keeps of memory: on CPU what XLA frees, for its next program; on GPUs their own.

On CPU XLA allocates the temporaries of every program that it runs, and frees them at its end. glibc
returns blocks of that size to the kernel, whichever thread they are allocated in, and the next
program faults in and clears every page again: a third of the CPU time of a training step of the
demo.
"""

import ctypes
import os

# The parameters of glibc's malloc.h. As an int, a limit must be below 2 GiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LIMIT = 2**30  # bytes; larger blocks are mapped and returned one by one, as before

# Of a GPU's memory; the rest is left to CUDA and its libraries. `segjax plan` counts on it.
GPU_SHARE = 0.92


def keep_freed_memory() -> None:
  """Makes free() keep blocks of up to 1 GiB; does nothing where the C library is not glibc.

  Must be called before other threads start, which would have arenas of their own.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
    return
  # One arena: the others are heaps of at most 64 MiB, so threads that have them map larger blocks,
  # whatever the threshold.
  mallopt(_M_ARENA_MAX, 1)
  mallopt(_M_MMAP_THRESHOLD, _LIMIT)
  mallopt(_M_TRIM_THRESHOLD, _LIMIT)


def take_gpu_memory() -> None:
  """Lets jax take GPU_SHARE of each GPU's memory instead of 0.75, where the user has not chosen.

  Must be called before jax finds its devices, which refuses two names of the same choice. See
  https://docs.jax.dev/en/latest/gpu_memory_allocation.html.
  """
  if 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in os.environ:  # the older name
    os.environ.setdefault('XLA_CLIENT_MEM_FRACTION', str(GPU_SHARE))
