"""All processes of a run meet at the first one's address, before jax: who does not come is named.

jax.distributed ends the process with a dump where one of them is missing.
"""

import contextlib
import json
import socket
import time
from typing import Any

from segjax.errors import UserError

_RETRY = 0.2  # seconds


def meet(address: str, number: int, index: int, timeout: float | int) -> None:
  """Returns in every process once all are there.

  Args:
    address: host:port of the first process, where jax will meet afterwards.
    number: of processes.
    index: of this one.
    timeout: seconds to wait.

  Raises:
    ValueError: the address is none, or processes are missing; it names them.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(f'--coordinator={address} must be host:port, as in 10.0.0.2:1234.')
  end = time.monotonic() + timeout
  missing = _wait(int(port), number, end) if index == 0 else _join((host, int(port)), index, end)
  if missing is None:
    raise UserError(
      f'process 0 did not answer at {address} within {timeout:g} s (--join_timeout): is it '
      'running, and is the port open?'
    )
  if missing:
    names = ', '.join(map(str, missing))
    raise UserError(
      f'process {names} of {number} did not come within {timeout:g} s (--join_timeout); start one '
      f'with each of --process_id=0 to {number - 1}.'
    )


def _wait(port: int, number: int, end: float) -> list[int]:
  """Of the first process: the indices that are missing in the end, told to all that are not."""
  come: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(socket.create_server(('', port), backlog=number))
    while len(come) < number - 1 and (left := end - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(left)
        come[_read(connection)] = connection
      except (TimeoutError, ValueError):
        continue  # nobody, or somebody else who tried the port
    missing = sorted(set(range(1, number)) - come.keys())
    for connection in come.values():
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps(missing).encode() + b'\n')
        connection.recv(1)  # the other side closes first, so that the port is free again
  return missing


def _join(address: tuple[str, int], index: int, end: float) -> list[int] | None:
  """Of the others: the indices that are missing, None where the first does not answer."""
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection(address, timeout=left) as connection:
        connection.sendall(json.dumps(index).encode() + b'\n')
        connection.settimeout(left + 5)  # the first one counts from its own start
        return _read(connection)
    except (OSError, ValueError):
      time.sleep(_RETRY)
  return None


def _read(connection: socket.socket) -> Any:
  """A line of JSON; ValueError where it is none."""
  with connection.makefile() as lines:
    return json.loads(lines.readline())
