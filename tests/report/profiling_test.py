"""The choice of traced steps, and the files of a trace."""

import gzip
import json

import jax.numpy as jnp
import pytest

from segjax.report.profiling import Profiler, parse


def test_steps():
  assert parse('') == (0, 0)
  assert parse('5:7') == (5, 8)
  assert parse('1:1') == (1, 2)


@pytest.mark.parametrize('steps', ['5', '7:5', '0:2', 'a:b', '-1:2', '1:2:3'])
def test_wrong_steps(steps):
  with pytest.raises(ValueError, match='first:last, steps from 1 on'):
    parse(steps)


def test_selected_steps_are_traced(tmp_path):
  profiler = Profiler(tmp_path, '2:3')
  for step in range(1, 6):
    profiler.before(step)
    traces = list(tmp_path.rglob('*.xplane.pb'))
    assert bool(traces) == (step > 3)
    profiler.after(step, jnp.ones(8) * step)
  profiler.close()
  (perfetto,) = tmp_path.rglob('perfetto_trace.json.gz')
  assert json.loads(gzip.decompress(perfetto.read_bytes()))['traceEvents']


def test_a_run_that_ends_early_has_a_trace(tmp_path):
  profiler = Profiler(tmp_path, '1:100')
  profiler.before(1)
  profiler.close()
  profiler.close()
  assert list(tmp_path.rglob('*.xplane.pb'))
