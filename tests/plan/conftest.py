"""What programs take of memory is looked at here, so they are compiled as they would run."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def whole_compiles():
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
