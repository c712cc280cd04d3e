"""The sizes of known models."""

import pytest

from configs import models
from segjax.model.llama import config_of, num_parameters
from segjax.settings import Network


@pytest.mark.parametrize(
  'size, parameters',
  # As their model cards say: 8.03 B, and 1.24 B with tied embeddings.
  [
    (models.llama3_8b, 8_030_261_248),
    (models.llama31_8b, 8_030_261_248),
    (models.llama32_1b, 1_235_814_400),
  ],
)
def test_sizes(size, parameters):
  assert num_parameters(config_of(Network(**size()))) == parameters
