"""Runs the commands of a study as processes, several at once, each after those that it needs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

import segjax
from segjax.errors import one_line
from segjax.jobs.study_graph import Node
from segjax.storage import write_text_atomically

DONE_FILE = 'done.json'  # in the directory of a finished run
LOG_FILE = 'log.txt'
_POLL = 0.1  # seconds


class Outcome(dict[Path, str]):
  """The error of each run that has ended, by its directory; '' of those that succeeded."""

  def error(self, nodes: Iterable[Node]) -> str | None:
    """Returns the first error of some runs, '' if there is none; None if one has not ended."""
    errors = [self.get(node.directory) for node in nodes]
    failed = next((error for error in errors if error), '')
    return failed or (None if None in errors else '')


def run_all(
  nodes: Iterable[Node], num_processes: int, ended: Callable[[Node, Outcome], None]
) -> Outcome:
  """Runs each node once all that it needs are finished; a failure stops those alone that need it.

  Args:
    nodes: in an order in which each follows those that it needs. Finished ones are not run again.
    num_processes: runs at once.
    ended: called after each run that has ended.

  Returns:
    How all of them ended.
  """
  waiting, outcome = list(dict.fromkeys(nodes)), Outcome()
  running: dict[Node, subprocess.Popen] = {}
  with _stopping(running):
    while waiting or running:
      for node in list(waiting):
        error = outcome.error(node.needs)
        if error is None:
          continue
        is_finished = not error and is_done(node)
        if not (error or is_finished):
          if len(running) == num_processes:
            continue
          running[node] = _start(node)
        waiting.remove(node)
        if error or is_finished:
          outcome[node.directory] = error
          ended(node, outcome)
      for node, process in list(running.items()):
        if process.poll() is not None:
          del running[node]
          outcome[node.directory] = _finish(node, process.returncode)
          ended(node, outcome)
      time.sleep(_POLL if running else 0)
  return outcome


def is_done(node: Node) -> bool:
  """Returns whether the run was finished, now or by an earlier command."""
  return (node.directory / DONE_FILE).exists()


def command(node: Node) -> list[str]:
  """Returns the command of a run."""
  paths = f'--config={node.config_file}', f'--workdir={node.directory}'
  return [sys.executable, '-m', 'segjax.main', *paths]


def _start(node: Node) -> subprocess.Popen:
  node.prepare()
  root = str(Path(segjax.__file__).parents[1])
  path = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
  environment = os.environ | {'PYTHONPATH': path}
  if cache := jax.config.jax_compilation_cache_dir:
    environment['JAX_COMPILATION_CACHE_DIR'] = cache
  # Several processes share an accelerator.
  environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  with (node.directory / LOG_FILE).open('wb') as log:
    return subprocess.Popen(
      command(node),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      env=environment,
      start_new_session=True,  # a second signal, of the terminal, would end it without a checkpoint
    )


def _finish(node: Node, code: int) -> str:
  """Records that a run has succeeded, or returns why it has not."""
  if code == 0:
    write_text_atomically(node.directory / DONE_FILE, json.dumps({'run': node.name}) + '\n')
    return ''
  text = (node.directory / LOG_FILE).read_text(encoding='utf-8', errors='replace')
  last = next(filter(None, map(str.strip, reversed(text.splitlines()))), 'no output')
  return f'{node.name}: {one_line(ValueError(last.removeprefix("segjax: ")))} (exit code {code})'


@contextlib.contextmanager
def _stopping(running: dict[Node, Any]) -> Iterator[None]:
  """Stops the runs that are left when the block ends by an error; each saves a checkpoint."""
  try:
    yield
  finally:
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.wait()
