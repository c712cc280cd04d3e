import jax.numpy as jnp
import numpy as np
import pytest

from segjax.rl.redistribution import by_attention


def test_by_hand():
  attention = jnp.array([9.0, 0.1, 0.3, 0.0, 5.0])  # the prompt's and the padding's do not count
  score = jnp.array([7.0, 1.0, -1.0, 2.0, 8.0])  # of the last real token: 2
  mask = jnp.array([False, True, True, True, False])
  np.testing.assert_allclose(by_attention(attention, score, mask), [0, 0.5, 1.5, 0, 0], rtol=1e-6)
  half = by_attention(attention, score, mask, share=0.5)
  np.testing.assert_allclose(half, [0, 0.25, 0.75, 1, 0], rtol=1e-6)


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_sums_to_the_score(share):
  rng = np.random.default_rng(0)
  mask = jnp.arange(12) < 9
  score = jnp.asarray(rng.normal(size=12), jnp.float32)
  reward = by_attention(jnp.asarray(rng.uniform(size=12), jnp.float32), score, mask, share=share)
  np.testing.assert_allclose(jnp.sum(reward), score[8], rtol=1e-5)
