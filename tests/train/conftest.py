"""Runs the tests on one device, unless a test sets another mesh."""

import jax
import pytest
from fixtures import models


@pytest.fixture(scope='package', autouse=True)
def one_device():
  with jax.set_mesh(models.mesh(1)):
    yield
