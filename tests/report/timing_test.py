"""Seconds of each part of a step, and the number of compiled programs."""

import time
import types

import jax
import jax.numpy as jnp

from segjax.report import timing


def test_parts_add_up_to_the_step(monkeypatch):
  clock = iter([1.0, 1.0, 4.0, 6.0, 6.5, 16.0])
  monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  monkeypatch.setattr(timing, '_intervals', [(0.0, 2.5), (5.0, 5.5)])
  parts = timing.StepTimer()
  parts.begin()
  parts.end('generate')
  parts.end('update')
  parts.end('between_steps')
  assert parts.seconds == {
    'timing/between_steps': 0.5,
    'timing/generate': 1.5,  # without the 1.5 s of compiling
    'timing/update': 1.5,
  }
  parts.begin()
  assert parts.seconds == {'timing/between_steps': 9.5}


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
  clock = [10.0]
  monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))

  class Array:  # ready after five seconds
    def block_until_ready(self):
      clock[0] += 5

  def evaluate():
    clock[0] += 2
    return {'eval/loss': 1.0}

  metrics = timing.time_evaluation(evaluate, step=Array())
  assert metrics == {'eval/loss': 1.0, 'timing/evaluate': 2.0}
