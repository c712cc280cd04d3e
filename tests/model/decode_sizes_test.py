import numpy as np
import pytest
from fixtures import models

from segjax.model import decode_sizes
from segjax.model.generate import make_decode_config
from segjax.model.sampling import Sampling


def decoder(config=models.CONFIG, max_new_tokens=16):
  sampling = Sampling(max_new_tokens=max_new_tokens)
  return make_decode_config(config, sampling, models.STOP_IDS, models.mesh(1))


@pytest.mark.parametrize(
  ('length', 'message'),
  [
    (0, 'prompt 3 is empty'),
    (60, 'prompt 3 has 60 tokens; .*max_new_tokens=16 .* positions for 48'),
  ],
)
def test_prompts_that_cannot_be_answered(length, message):
  lengths = np.array([1, 8, 3, length, 8, 2, 7, 4])
  with pytest.raises(ValueError, match=message):
    decode_sizes.check_prompts(lengths, decoder())
