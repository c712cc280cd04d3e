"""One device unless a test says otherwise, and quick compiles, most of these tests' time."""

import jax
import pytest
from model import tiny


@pytest.fixture(scope='package', autouse=True)
def quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='package', autouse=True)
def one_device():
  with jax.set_mesh(tiny.mesh(1)):
    yield
