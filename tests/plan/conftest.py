"""Plans are of optimized programs, so the tests compile with optimizations."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def whole_compiles():
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
