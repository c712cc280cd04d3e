"""Several processes of one run, one per host: how they meet, what all agree on, who is missing.

Every process runs the same program on the same settings and sees the same working directory; the
first writes to it. Everything here is at hand, and does nothing, where there is one process.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from segjax import rendezvous
from segjax.errors import UserError, first_line

_BEAT = 5.0  # seconds between two signs of life
_PATIENCE = 30.0  # seconds without one, after which a process is missing
_PREFIX = 'segjax/alive/'
_LINE = 'segjax/line'  # where the first process holds a line to each of the others

_index, _count = 0, 1
_lines: list[socket.socket] = []  # of the first process to the others


def process_count() -> int:
  """Of the run."""
  return _count


def process_index() -> int:
  """Which of them this one is, from 0."""
  return _index


def is_first() -> bool:
  """Whether this process writes files and speaks."""
  return _index == 0


def initialize(
  address: str = '',
  number: int = 0,
  index: int = -1,
  timeout: float | int = 300,
  has_tpu: bool = False,
) -> None:
  """Meets the other processes: those of the flags, of SLURM, or of a Cloud TPU slice, if any.

  Args:
    address: host:port of the first; '' to find out.
    number: of processes; read with `address`.
    index: of this one.
    timeout: seconds to wait for the others.
    has_tpu: whether to ask the Cloud TPU slice who belongs to it.

  Raises:
    ValueError: the flags do not fit, or a process did not come; it names which.
  """
  known: dict[str, Any] = {}
  if address:
    if not 0 <= index < number:
      raise UserError(
        f'--coordinator={address} needs --num_processes=N and --process_id=0 to N-1; '
        f'found {number} and {index}.'
      )
    rendezvous.meet(address, number, index, timeout)
    known = {'coordinator_address': address, 'num_processes': number, 'process_id': index}
  elif not _is_slurm_step() and not has_tpu:
    return
  global _index, _count
  import jax

  try:
    jax.distributed.initialize(
      **known,
      initialization_timeout=int(timeout),
      heartbeat_timeout_seconds=int(2 * _PATIENCE),
      shutdown_timeout_seconds=int(_PATIENCE),
    )
  except ValueError:
    if not has_tpu or address:
      raise
    return  # a TPU that belongs to no slice that jax knows
  except RuntimeError as error:
    raise UserError(
      f'not all processes of the run came together within {timeout:.0f} s '
      f'(--join_timeout): {first_line(error)}'
    ) from error
  _index, _count = jax.process_index(), jax.process_count()
  if _count > 1:
    follow = _hold_lines if is_first() else _watch_line
    for target in (_watch, follow):
      threading.Thread(target=target, daemon=True).start()


def _is_slurm_step() -> bool:
  """Whether srun started this as one of several; a batch script itself is alone."""
  return 'SLURM_STEP_NODELIST' in os.environ and int(os.environ.get('SLURM_NTASKS', '1')) > 1


def _client() -> Any:
  from jax._src import distributed  # there is no public way to the key-value store

  return distributed.global_state.client


def _beat(client: Any, beat: int) -> None:
  sign = json.dumps({'beat': beat, 'host': socket.gethostname(), 'pid': os.getpid()})
  client.key_value_set(f'{_PREFIX}{_index}', sign, allow_overwrite=True)


def _alive(client: Any) -> dict[int, dict[str, Any]]:
  """The last sign of life of each process."""
  found = client.key_value_dir_get(_PREFIX)
  return {int(key.rpartition('/')[2]): json.loads(value) for key, value in found}


def _watch() -> None:
  """Ends this process where another has given no sign of life for too long, and names it."""
  client, beat = _client(), 0
  heard: dict[int, tuple[int, float]] = {}
  while True:
    time.sleep(_BEAT)
    beat += 1
    try:
      _beat(client, beat)
      signs = _alive(client)
    except Exception as error:
      if sys.is_finalizing():
        return
      _end(f'process 0, which the others meet at, is gone ({first_line(error)})')
    now = time.monotonic()
    for index, sign in signs.items():
      if heard.get(index, (-1, now))[0] != sign['beat']:
        heard[index] = (sign['beat'], now)
      elif now - heard[index][1] > _PATIENCE:
        silent = now - heard[index][1]
        _end(f'process {index} (pid {sign["pid"]} on {sign["host"]}) is silent for {silent:.0f} s')


def _hold_lines() -> None:
  """Of the first process: a connection to each of the others; it breaks when this one is lost."""
  atexit.register(_part, '')  # an end in order
  with socket.create_server(('', 0)) as server:
    sign = {'port': server.getsockname()[1], 'host': socket.gethostname(), 'pid': os.getpid()}
    _client().key_value_set(_LINE, json.dumps(sign))
    while len(_lines) < _count - 1:
      _lines.append(server.accept()[0])
  threading.Event().wait()


def _part(reason: str) -> None:
  """Tells the others why this process ends, '' for an end in order; only the first has lines."""
  for line in _lines:
    with contextlib.suppress(OSError):
      line.sendall(f'{reason}\n'.encode())


def _watch_line() -> None:
  """Ends this process when the first is lost, before jax does, which would not say why."""
  from jax._src import distributed

  with contextlib.suppress(Exception):  # no line: jax ends it
    sign = json.loads(_client().blocking_key_value_get(_LINE, int(1000 * _PATIENCE)))
    host = distributed.global_state.coordinator_address.rpartition(':')[0].strip('[]')
    line = socket.create_connection((host, sign['port']), timeout=_PATIENCE)
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {'TCP_KEEPIDLE': _BEAT, 'TCP_KEEPINTVL': _BEAT, 'TCP_KEEPCNT': 4}.items():
      if hasattr(socket, option):  # a host that is lost says nothing; this asks
        line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), int(value))
    said = ''
    with contextlib.suppress(OSError), line.makefile(encoding='utf-8') as text:
      said = text.readline()
    if said != '\n' and not sys.is_finalizing():
      gone = f'process 0 (pid {sign["pid"]} on {sign["host"]}), where the others meet, is gone'
      _end(said.strip() or gone)


def _end(reason: str) -> None:
  text = f'segjax: {reason}; this one stops. Start all again: they go on from what is saved.'
  print(text, file=sys.stderr, flush=True)
  _part(reason)
  os._exit(1)


def fail(error: BaseException) -> None:
  """Waits, after an error, for the watch to name the process that caused it, if it was another."""
  print(f'segjax: {first_line(error)}', file=sys.stderr, flush=True)
  time.sleep(_PATIENCE + 3 * _BEAT)


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def broadcast_from_first(value: Any) -> Any:
  """The first process's value, which JSON can hold, in all of them."""
  if process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  mine = np.zeros(size, np.uint8)
  mine[: min(size, len(data))] = data[:size]
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(mine)))


def any_process(flag: bool) -> bool:
  """Whether it is true in one of them."""
  if process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array([flag])).any())


def to_host(tree: Any) -> Any:
  """The arrays whole, on every host."""
  import jax

  if process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


def check_shared_filesystem(directory: Path) -> None:
  """ValueError unless all processes see what the first writes there."""
  if process_count() == 1:
    return
  mark = directory / '.shared'
  token = broadcast_from_first(f'{time.time()}')
  if is_first():
    mark.write_text(token)
  barrier('shared')
  is_seen = mark.is_file() and mark.read_text() == token
  is_missed = any_process(not is_seen)
  barrier('seen')
  if is_first():
    mark.unlink()
  if is_missed:
    raise UserError(
      f'{directory} is not the same directory for all processes; give a --workdir on a file system '
      'that they share.'
    )
