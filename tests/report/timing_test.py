"""Seconds of each part of a step, and the number of compiled programs."""

import types

import jax
import jax.numpy as jnp

from segjax.report import timing


def test_parts_add_up_to_the_step(monkeypatch):
  clock = iter([0.0, 1.0, 4.0, 6.0, 16.0])
  monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  parts = timing.StepTimer()
  parts.begin()
  parts.end('generate')
  parts.end('update', jnp.zeros(2))
  assert parts.seconds == {
    'timing/between_steps': 1.0,
    'timing/generate': 3.0,
    'timing/update': 2.0,
  }
  parts.begin()
  assert parts.seconds == {'timing/between_steps': 10.0}


def test_compiles_are_counted():
  before = timing.compiles()
  function = jax.jit(lambda x: x * 3 + 1)
  function(jnp.zeros(7))
  after = timing.compiles()
  assert after > before
  function(jnp.ones(7))
  assert timing.compiles() == after
