"""One device unless a test says otherwise."""

import jax
import pytest
from fixtures import models


@pytest.fixture(scope='package', autouse=True)
def one_device():
  with jax.set_mesh(models.mesh(1)):
    yield
