import dataclasses

import numpy as np
import pytest
from fixtures import models

from segjax.model import decode_sizes
from segjax.model.generate import make_decode_config
from segjax.model.llama import num_parameters
from segjax.model.sampling import Sampling

PROMPT = 8  # tokens of the longest prompt
WEIGHTS = 4 * num_parameters(models.CONFIG)  # bytes, float32


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


def test_a_cache_that_does_not_fit_names_what_does(monkeypatch):
  """Two layers, two heads of 8, float32: 256 bytes a position, 64 positions, 16 KiB a slot."""
  monkeypatch.setattr(decode_sizes, '_free_bytes', lambda mesh: WEIGHTS + 5 * 2**14 + 1.0)
  with pytest.raises(ValueError, match=r'8 responses .*64 positions.*max_concurrent to at most 5'):
    decode_sizes.check_memory(8, PROMPT, decoder(), models.mesh(1))
  decode_sizes.check_memory(5, PROMPT, decoder(), models.mesh(1))
  monkeypatch.setattr(decode_sizes, '_free_bytes', lambda mesh: WEIGHTS - 1.0)
  with pytest.raises(ValueError, match='use more devices'):
    decode_sizes.check_memory(8, PROMPT, decoder(), models.mesh(1))


def test_a_cache_that_grows_is_counted_with_the_one_before(monkeypatch):
  """From 64 to 128 positions: 192 at once, 48 KiB a slot."""
  monkeypatch.setattr(decode_sizes, '_free_bytes', lambda mesh: WEIGHTS + 3 * 48 * 2**10 + 1.0)
  config = dataclasses.replace(models.CONFIG, max_position_embeddings=256)
  with pytest.raises(ValueError, match=r'8 responses .*128 positions.*max_concurrent to at most 3'):
    decode_sizes.check_memory(8, PROMPT, decoder(config, 60), models.mesh(1))
