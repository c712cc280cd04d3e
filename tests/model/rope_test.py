import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segjax.model.rope import RopeScaling, rope_frequencies, rotate


def test_rotation_is_in_float32():
  """Angles and products are in float32 though input and output are bfloat16."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.bfloat16)
  positions = jnp.arange(4)[None] + 50
  frequency = rope_frequencies(8, 500_000.0)
  rotated = rotate(x, positions, frequency)
  assert rotated.dtype == jnp.bfloat16
  expected = rotate(x.astype(jnp.float32), positions, frequency)
  # Half a unit in the last of 8 bits, of numbers below 4.
  assert_allclose(rotated.astype(jnp.float32), expected, atol=2**-7)


SCALINGS = {
  'default': None,
  'linear': RopeScaling('linear', 3.0),
  'llama31': RopeScaling('llama3', 8.0, 1.0, 4.0, 8192),
  'short': RopeScaling('llama3', 4.0, 1.0, 4.0, 16),
}


# The kinds that a formula of its own computes; with both sizes of head.
@pytest.mark.parametrize(
  ('name', 'head_dim'), [('default', 64), ('linear', 128), ('llama31', 128), ('short', 64)]
)
def test_frequencies_equal_transformers(name, head_dim):
  pytest.importorskip('torch')
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaling = SCALINGS[name]
  parameters = {'rope_type': 'default', 'rope_theta': 500_000.0}
  if scaling is not None:
    parameters |= dataclasses.asdict(scaling)
    parameters['rope_type'] = parameters.pop('kind')
  theirs = transformers.LlamaConfig(
    hidden_size=4 * head_dim,
    num_attention_heads=4,
    head_dim=head_dim,
    max_position_embeddings=131072,
    rope_parameters=parameters,
  )
  if scaling is None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
  else:
    expected, _ = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, 'cpu')
  got = rope_frequencies(head_dim, 500_000.0, scaling)
  assert got.dtype == np.float32
  # To the last bit: at position 100,000 it is 0.006 radians of the fastest channels. The power of
  # torch is one bit off in some channels, which differ by platform.
  ulps = np.abs(got.view(np.int32) - expected.numpy().view(np.int32))
  assert ulps.max() <= 2
  assert np.mean(ulps == 0) > 0.9


def test_unknown_rope_type_is_refused():
  with pytest.raises(ValueError, match=r"'yarn' is not one of default, linear, llama3, longrope"):
    rope_frequencies(8, 500_000.0, RopeScaling('yarn', 2.0))


def test_rotation_is_relative_and_keeps_length():
  frequency = rope_frequencies(8, 100.0, SCALINGS['short'])
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

  def product(i, j):
    rotated = [rotate(x, jnp.array([[p]]), frequency) for x, p in ((query, i), (key, j))]
    return jnp.sum(rotated[0] * rotated[1], axis=-1)

  # float32 angles below 40 radians.
  assert_allclose(product(5, 3), product(39, 37), atol=1e-4)
  assert_allclose(product(4, 4), jnp.sum(query * key, axis=-1), atol=1e-5)
  assert np.abs(product(5, 3) - product(3, 5)).max() > 1e-2
