"""Compiles with optimizations: a plan measures optimized programs."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def full_optimizations():
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
