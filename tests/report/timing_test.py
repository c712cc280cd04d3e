"""Seconds of each part of a step, and the number of compiled programs."""

import threading
import time
import types

import jax
import jax.numpy as jnp

from segjax.report import timing


class Clock:
  """The host's time; numbers stand for arrays that are ready at that time, others are now."""

  def __init__(self, monkeypatch, compiling=()):
    self.now = 0.0
    monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: self.now))
    monkeypatch.setattr(timing, '_intervals', list(compiling))
    monkeypatch.setattr(timing, 'Completion', self._completion)

  def _completion(self, arrays):
    ready = arrays if isinstance(arrays, float) else self.now
    return types.SimpleNamespace(wait=lambda: ready)


def numbers(timer):
  return {name.removeprefix('timing/'): float(x) for name, x in timer.seconds.items()}


def test_parts_add_up_to_the_step(monkeypatch):
  """The devices are behind: the host has dispatched all of a step when they score."""
  clock = Clock(monkeypatch)
  timer = timing.StepTimer()
  clock.now = 1.0
  timer.begin()
  clock.now = 1.5
  timer.end('generate', 4.0)
  clock.now = 4.5
  timer.end('score', 6.0)
  clock.now = 4.75
  timer.end('update', 9.0)
  clock.now = 5.0
  timer.end('between_steps')
  first = timer.seconds
  clock.now = 10.0
  timer.begin()  # a second after the update
  clock.now = 12.0
  timer.end('generate', 12.5)
  assert {name: float(x) for name, x in first.items()} == {
    'timing/between_steps': 0.0,
    'timing/generate': 3.0,
    'timing/score': 2.0,
    'timing/update': 3.0,
    'timing/step': 8.0,
    'timing/compile': 0.0,
  }
  assert numbers(timer) == {'between_steps': 1.0, 'generate': 2.5, 'step': 3.5, 'compile': 0.0}


def test_compiling_counts_where_the_devices_wait_for_it(monkeypatch):
  """Of scoring for 2 s, of updates for 3 s, of which the devices score for 1."""
  clock = Clock(monkeypatch, [(2.0, 4.0), (4.0, 7.0)])
  timer = timing.StepTimer()
  timer.begin()
  for clock.now, name, ready in [(2.0, 'generate', 2.0), (4.0, 'score', 5.0), (7.0, 'update', 8.0)]:
    timer.end(name, ready)
  assert numbers(timer) == {
    'between_steps': 0.0,
    'generate': 2.0,
    'score': 1.0,
    'update': 1.0,
    'step': 4.0,
    'compile': 4.0,
  }


def test_no_part_waits_for_the_devices():
  ready = threading.Event()

  class Array:
    def block_until_ready(self):
      ready.wait()

  timer = timing.StepTimer()
  timer.begin()
  timer.end('update', Array())
  assert not ready.is_set()  # else this line would not be reached
  time.sleep(0.01)
  ready.set()
  assert numbers(timer)['update'] > 0.01


def test_compiles_are_counted_and_timed():
  before, begin = timing.compiles(), time.monotonic()
  function = jax.jit(lambda x: jax.jit(jnp.sin)(x) * 3 + 1)
  function(jnp.zeros(7))
  after, end = timing.compiles(), time.monotonic()
  assert after > before
  # Tracing the inner function is not counted twice.
  assert 0 < timing.compile_seconds(begin, end) <= end - begin
  function(jnp.ones(7))
  assert timing.compiles() == after and timing.compile_seconds(end, time.monotonic()) == 0


def test_an_evaluation_does_not_include_the_step_before_it(monkeypatch):
  clock = Clock(monkeypatch)

  def evaluate():
    clock.now = 17.0
    return {'eval/loss': 1.0}

  metrics = timing.time_evaluation(evaluate, step=15.0)
  assert metrics['eval/loss'] == 1.0 and float(metrics['timing/evaluate']) == 2.0
