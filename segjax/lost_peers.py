"""Explains in one line why jax ended a process that lost another one; jax prints a stack trace.

After the trace jax calls abort(), so a second process has to do this: run as a program, this module
copies its stdin to stderr. (jaxlib has a `missed_heartbeat_callback`, but calling a Python function
there fails with std::bad_cast.)
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

_RESTART = 'restart all processes to resume from the last checkpoint.'
_ABORT = 'JAX distributed service detected fatal errors'
# Warnings and errors of several lines, which jax prints before the fatal one.
_PRELUDE = re.compile(r'^[WEF]\d{4} .*(coordination_service|preemption_sync_manager)')


def explain_aborts(timeout: str) -> int:
  """Sends file descriptor 2 through this program; returns a descriptor of the former stderr.

  Python's own stderr is not redirected.

  Args:
    timeout: the time limit for joining, in words.
  """
  stderr = os.dup(2)
  command = [sys.executable, '-m', 'segjax.lost_peers', timeout]
  # The cwd lets -m import segjax wherever the run was started.
  child = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])
  os.dup2(child.stdin.fileno(), 2)
  # Descriptor 2 is the only writer left: the child reads to the end and exits with this process.
  child.stdin.close()
  # Not through the child, which holds back every line after the first one of jax.
  sys.stderr = os.fdopen(os.dup(stderr), 'w', buffering=1, encoding='utf-8')
  return stderr


def mute() -> None:
  """Discards what jax prints from now on, in a process that has printed why it exits."""
  with open(os.devnull, 'wb') as null:
    os.dup2(null.fileno(), 2)


def filter_stderr(timeout: str) -> None:
  """Copies stdin to stderr until jax aborts the process that writes; explains that in one line."""
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; stdin ends by itself
    signal.signal(number, signal.SIG_IGN)
  held = ''
  for data in sys.stdin.buffer:
    line = data.decode(errors='replace')
    # The message of an abort has many lines, and which peer is lost is in the later ones.
    if held or _PRELUDE.match(line) or _ABORT in line:
      held += line
    else:
      print(line, end='', file=sys.stderr, flush=True)
  # Without an abort they were warnings, which are printed as they are.
  if _ABORT in held:
    held = f'segjax: {explain(held, timeout)}\n'
  print(held, end='', file=sys.stderr, flush=True)


def explain(log: str, timeout: str) -> str:
  """Returns in one sentence why jax's coordination service ended a process.

  Args:
    log: what jax wrote to stderr.
    timeout: the time limit for joining, in words.
  """
  matches = re.findall(r'(?:task names|heartbeats\)):\n((?:\d+\n)+)', log)
  # No names: the coordinator itself is gone, and it runs in process 0.
  names = sorted(matches[-1].split(), key=int) if matches else ['0']
  peers = ('process ' if len(names) == 1 else 'processes ') + ', '.join(names)
  if first := re.search(r'Id: Shutdown.*\n#.*\nThe first task at the barrier: (\d+)', log):
    return f'process {first[1]} failed; see its output, then {_RESTART}'
  if '/RegisterTask' not in log:
    return f'lost {peers}; {_RESTART}'
  if matches:
    return f'{peers} did not join within {timeout}; start one process for each index from 0.'
  return f'process 0 did not answer within {timeout}; check that it runs and its port is open.'


if __name__ == '__main__':
  filter_stderr(sys.argv[1])
