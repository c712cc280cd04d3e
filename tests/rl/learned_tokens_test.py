import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.responses import make_batch
from fixtures.strategies import corrupted

from segjax.rl import oracle_learned_tokens
from segjax.rl.learned_tokens import high_entropy_tokens

CHOOSE = jax.jit(high_entropy_tokens)


def test_worked_example():
  # Seven tokens, 0.3 of which are three; that of entropy 2 that ties with the third comes too.
  entropy = jnp.array([[jnp.nan, 3.0, 2.0, 0.5], [1.0, 2.0, 9.0, jnp.nan], [0.0, 1.5, 9.0, 9.0]])
  mask = jnp.array([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
  chosen = CHOOSE(entropy, mask, 0.3)
  assert chosen.tolist() == [[False, True, True, False], [False, True, False, False], [False] * 4]


@pytest.mark.parametrize('share', [1e-6, 0.2, 0.5, 1.0])
def test_equals_the_oracle(share):
  batch = make_batch(7)
  for mask in (batch.mask, np.zeros_like(batch.mask)):
    chosen = CHOOSE(corrupted(batch.entropy, mask), mask, share)
    expected = oracle_learned_tokens.high_entropy_tokens(batch.entropy, mask, share)
    assert chosen.tolist() == expected


def test_a_share_of_whole_tokens_is_that_share():
  """0.2 · n in float32 may lie above an integer; then one token too many would be chosen."""
  for n in range(5, 400, 5):
    entropy = jnp.arange(400.0)[None]
    assert CHOOSE(entropy, entropy < n, 0.2).sum() == n // 5
