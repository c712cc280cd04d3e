"""Compile time is most of these tests' time: LLVM's optimizations cost more than they save."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
