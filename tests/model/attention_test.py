import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segjax.model.attention import attention


def arrays(heads=4, kv_heads=2, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = ((2, 6, heads, 8), (2, 6, kv_heads, 8), (2, 6, kv_heads, 8))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def by_loops(query, key, value, mask):
  """One head, one query at a time."""
  out = np.zeros(query.shape)
  group = query.shape[2] // key.shape[2]
  for b, q, h in np.ndindex(*query.shape[:3]):
    seen = [s for s in range(key.shape[1]) if mask[b, q, s]]
    weight = np.exp([query[b, q, h] @ key[b, s, h // group] / np.sqrt(8) for s in seen])
    out[b, q, h] = sum(w * value[b, s, h // group] for w, s in zip(weight, seen, strict=True))
    out[b, q, h] /= weight.sum()
  return out


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_causal_grouped_queries(kv_heads):
  query, key, value = arrays(kv_heads=kv_heads)
  mask = np.tril(np.ones((2, 6, 6), bool))
  expected = by_loops(*map(np.asarray, (query, key, value)), mask)
  assert_allclose(attention(query, key, value), expected, atol=1e-5)  # float32
  assert_allclose(attention(query, key, value, jnp.asarray(mask)), expected, atol=1e-5)


def test_explicit_mask():
  query, key, value = arrays()
  mask = np.random.default_rng(1).random((2, 6, 6)) < 0.5
  mask[..., 0] = True
  expected = by_loops(*map(np.asarray, (query, key, value)), mask)
  assert_allclose(attention(query, key, value, jnp.asarray(mask)), expected, atol=1e-5)


def test_row_that_sees_nothing_is_finite():
  """Padding on the left of a prompt: its numbers are never read, but must not be NaN."""
  query, key, value = arrays()
  mask = jnp.ones((2, 6, 6), bool).at[:, 0].set(False)

  def loss(query):
    return jnp.sum(attention(query, key, value, mask))

  out, grad = jax.value_and_grad(loss)(query)
  assert jnp.isfinite(out)
  assert jnp.all(jnp.isfinite(grad))


def test_softmax_is_in_float32():
  """1 + 2⁻⁹ cannot be told from 1 in bfloat16, yet many such keys move the mean."""
  query, key, value = arrays(dtype=jnp.bfloat16)
  out = attention(query, key, value)
  assert out.dtype == jnp.bfloat16
  wide = [x.astype(jnp.float32) for x in (query, key, value)]
  # Weights and output are rounded to 8 bits, the logits are not.
  assert_allclose(out.astype(jnp.float32), attention(*wide), atol=0.03)


def test_unknown_implementation():
  with pytest.raises(ValueError, match=r"attention='flash' is not one of \('xla', 'cudnn'\)"):
    attention(*arrays(), implementation='flash')
