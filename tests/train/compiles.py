"""Counts what XLA compiles."""

import contextlib
import logging
import re

import jax


@contextlib.contextmanager
def compiled(caplog):
  """Yields a list that holds the names of the functions compiled, once the block has ended."""
  names = []
  caplog.clear()
  with caplog.at_level(logging.WARNING), jax.log_compiles():
    yield names
  for record in caplog.records:
    if match := re.match(r'Finished XLA compilation of jit\((\w+)\)', record.getMessage()):
      names.append(match[1])
