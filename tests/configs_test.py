"""The sizes of published models."""

import pytest

from configs.shared import model_sizes
from segjax.config.settings import Network
from segjax.model.llama import make_config, num_parameters


@pytest.mark.parametrize(
  'size, parameters',
  # From their model cards: 8.03 B, and 1.24 B with tied embeddings.
  [
    (model_sizes.llama3_8b, 8_030_261_248),
    (model_sizes.llama31_8b, 8_030_261_248),
    (model_sizes.llama32_1b, 1_235_814_400),
  ],
)
def test_sizes(size, parameters):
  assert num_parameters(make_config(Network(**size()))) == parameters
