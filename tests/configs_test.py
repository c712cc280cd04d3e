"""The sizes of published models."""

import pytest

from configs.shared import model_sizes
from segjax.config.settings import Network
from segjax.model.llama import make_config, num_parameters


@pytest.mark.parametrize(
  'size, parameters',
  # From their model cards: 8.03 B, 1.24 B with tied embeddings, and 3.8 B.
  [
    (model_sizes.llama3_8b, 8_030_261_248),
    (model_sizes.llama31_8b, 8_030_261_248),
    (model_sizes.llama32_1b, 1_235_814_400),
    (model_sizes.phi3_mini, 3_821_079_552),
  ],
)
def test_sizes(size, parameters):
  assert num_parameters(make_config(Network(**size()))) == parameters
