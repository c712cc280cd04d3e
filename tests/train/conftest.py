"""One device unless a test says otherwise."""

import jax
import pytest
from model import tiny


@pytest.fixture(scope='package', autouse=True)
def one_device():
  with jax.set_mesh(tiny.mesh(1)):
    yield
