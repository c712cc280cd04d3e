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


ATTENDED = jnp.array([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]])


def test_unattended_tokens_are_not_seen_and_find_nothing():
  query, key, value = arrays()
  mask = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6))
  seen = mask & (np.asarray(ATTENDED) > 0)[:, None]
  expected = by_loops(*map(np.asarray, (query, key, value)), seen | np.eye(6, dtype=bool))
  expected[np.asarray(ATTENDED) == 0] = 0
  found = attention(query, key, value, segment_ids=ATTENDED)
  assert_allclose(found, expected, atol=1e-5)  # float32
  assert np.all(np.asarray(found)[np.asarray(ATTENDED) == 0] == 0)


def test_all_attended_is_none_given():
  query, key, value = arrays()
  found = attention(query, key, value, segment_ids=jnp.ones((2, 6), int))
  np.testing.assert_array_equal(found, attention(query, key, value))


@pytest.mark.parametrize('attended', [ATTENDED, jnp.zeros((2, 6), int)])
def test_unattended_tokens_have_no_gradient(attended):
  def loss(*given):
    return jnp.sum(attention(*given, segment_ids=attended) ** 2)

  out, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays())
  assert jnp.isfinite(out)
  for grad in map(np.asarray, grads):
    assert np.all(np.isfinite(grad))
    assert np.all(grad[np.asarray(attended) == 0] == 0)


def test_what_cudnn_is_asked_for(monkeypatch):
  """The call as it is made on CUDA, answered by the implementation that runs anywhere."""
  answer, asked = jax.nn.dot_product_attention, []

  def elsewhere(*given, implementation, **named):
    asked.append(implementation)
    return answer(*given, implementation='xla', **named)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', elsewhere)
  for attended in (None, ATTENDED):
    found = attention(*arrays(), implementation='cudnn', segment_ids=attended)
    assert_allclose(found, attention(*arrays(), segment_ids=attended), atol=1e-5)  # float32
  assert asked == ['cudnn'] * 2


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
