"""Several processes of one run, one per host, on jax.distributed: start, exchange of values, loss.

Every process runs the same program with the same settings and sees the same working directory; the
first one writes to it. All functions work, and communicate nothing, in a run of one process.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segjax import lost_peers
from segjax.errors import UserError

_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat, after which jax declares a process lost
_SHUTDOWN_TIMEOUT = 10  # seconds that a process which exits waits for the others

# Kept here: jax.process_index() would start the devices, which must not happen before the
# processes have joined.
_process_index, _process_count = 0, 1


def process_count() -> int:
  """Returns the number of processes of the run."""
  return _process_count


def process_index() -> int:
  """Returns the index of this process, from 0."""
  return _process_index


def is_first() -> bool:
  """Returns whether this process writes files and prints."""
  return _process_index == 0


def initialize(
  address: str = '',
  number: int = 0,
  index: int = -1,
  timeout: float | int = 300,
  has_tpu: bool = False,
) -> None:
  """Joins the other processes: those of the flags, of SLURM, or of a Cloud TPU slice, if any.

  From then on jax ends every process that has lost a peer. It does so by a stack trace and
  abort(), which `lost_peers` turns into one line.

  Args:
    address: host:port of the first process; '' to detect it.
    number: number of processes; read with `address`.
    index: index of this process; read with `address`.
    timeout: seconds to wait for the others.
    has_tpu: whether to ask the Cloud TPU slice for its members.

  Raises:
    UserError: the flags do not fit together.
  """
  provided: dict[str, Any] = {}
  if address:
    _check_flags(address, number, index)
    provided = {'coordinator_address': address, 'num_processes': number, 'process_id': index}
  elif not _is_slurm_step() and not has_tpu:
    return
  global _process_index, _process_count
  import jax

  # Before jax starts the threads that may abort this process.
  stderr = lost_peers.explain_aborts(f'{timeout:g} s (--join_timeout)')
  try:
    with _registration_timeout(int(timeout)):
      jax.distributed.initialize(
        **provided,
        initialization_timeout=int(timeout) + 5,  # later than the coordinator, which has the names
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
      )
  except ValueError:
    os.dup2(stderr, 2)  # there are no peers to lose
    if not has_tpu or address:
      raise
    return  # a TPU that belongs to no slice that jax detects
  _process_index, _process_count = jax.process_index(), jax.process_count()


def _check_flags(address: str, number: int, index: int) -> None:
  host, _, port = address.rpartition(':')
  if not 0 <= index < number:
    raise UserError(
      f'--coordinator={address} needs --num_processes=N and --process_id=0 to N-1; '
      f'found {number} and {index}.'
    )
  if not host or not port.isdecimal():
    raise UserError(f'--coordinator={address} must be host:port, as in 10.0.0.2:1234.')


def _is_slurm_step() -> bool:
  """Returns whether srun started this as one of several processes; a batch script is alone."""
  return 'SLURM_STEP_NODELIST' in os.environ and int(os.environ.get('SLURM_NTASKS', '1')) > 1


@contextlib.contextmanager
def _registration_timeout(seconds: int) -> Iterator[None]:
  """Makes jax's coordinator give up after `seconds`, with the names of the missing processes.

  jax.distributed.initialize has no argument for it: without, each process runs into its own
  initialization_timeout, which names nobody.
  """
  from jax._src.lib import _jax

  make_service = _jax.get_distributed_runtime_service
  _jax.get_distributed_runtime_service = functools.partial(
    make_service, cluster_register_timeout=seconds
  )
  try:
    yield
  finally:
    _jax.get_distributed_runtime_service = make_service


def wait_for_culprit(error: BaseException) -> None:
  """Waits, after an error, long enough for jax to end this process if it lost another one."""
  line = str(error).strip().partition('\n')[0][:300]
  # The first sign of a lost peer is a failed collective; jax names the peer only once its
  # heartbeats have been missing for the timeout.
  print(f'segjax: {line}', file=sys.stderr, flush=True)
  time.sleep(_HEARTBEAT_TIMEOUT + 10)


def barrier(name: str) -> None:
  """Waits until all processes have called it."""
  if process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def broadcast_from_first(value: Any) -> Any:
  """Returns the first process's value, which JSON can hold, in all processes."""
  if process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  # The size first: the array of a broadcast has one shape in all processes.
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  buffer = np.zeros(size, np.uint8)
  buffer[: min(size, len(data))] = data[:size]  # read only from the first process
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)))


def in_first(compute: Callable[[], Any]) -> Any:
  """Returns in all processes what `compute` returns in the first, which JSON can hold.

  Raises:
    UserError: `compute` has raised it; in all processes.
  """
  if process_count() == 1:
    return compute()
  value, error = None, None
  if is_first():
    try:
      value = compute()
    except UserError as raised:
      error = str(raised)
  value, error = broadcast_from_first((value, error))
  if error is not None:
    raise UserError(error)
  return value


def any_process(flag: bool) -> bool:
  """Returns whether `flag` is true in any process."""
  if process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  # Collective: each process has to call it equally often, also when its own flag is false; where a
  # single one does not, all others wait.
  return bool(multihost_utils.process_allgather(np.array([flag])).any())


def smallest(value: float) -> float:
  """Returns the smallest of the processes' values, in all processes."""
  if process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  # Collective, as `any_process`. Two halves: jax would round a float64 to float32.
  bits = np.frombuffer(np.float64(value).tobytes(), np.uint32)
  return float(min(multihost_utils.process_allgather(bits).reshape(-1, 2).view(np.float64)[:, 0]))


def to_host(tree: Any) -> Any:
  """Returns the complete arrays of `tree` as numpy arrays, on every host."""
  import jax

  if process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  def gather(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)  # complete on this host: nothing to exchange
    return multihost_utils.process_allgather(x, tiled=True)  # shards joined, not stacked

  return jax.tree.map(gather, tree)


def check_shared_filesystem(directory: Path) -> None:
  """Raises UserError unless all processes see the file that the first one writes there."""
  if process_count() == 1:
    return
  mark = directory / '.shared'
  token = broadcast_from_first(f'{time.time()}')  # a file of an earlier run holds another one
  if is_first():
    mark.write_text(token)
  barrier('shared')  # written before any process reads it
  is_seen = mark.is_file() and mark.read_text() == token
  is_missed = any_process(not is_seen)
  barrier('seen')  # read by all before it is removed
  if is_first():
    mark.unlink()
  if is_missed:
    raise UserError(
      f'--workdir={directory} is not the same directory for all processes; give one on a file '
      'system that they share.'
    )
