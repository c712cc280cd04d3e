import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.logprobs import logprob_and_entropy


@pytest.mark.parametrize(
  ('logits', 'entropy'),
  [
    ([0, 0, 0, 0], 1.3862943611),
    ([2, 1, 0, -1], 0.9475369640),
    ([10, 0, 0, 0], 0.0014980029),
    ([0, 0], 0.6931471806),
  ],
)
def test_entropy_golden(logits, entropy):
  got = logprob_and_entropy(jnp.array(logits, jnp.float32), jnp.array(0))[1]
  assert_allclose(got, entropy, atol=1e-6)  # float32


def test_equals_oracle():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 11)).astype(np.float32) * 4
  target = rng.integers(0, 11, (3, 5))
  logprob, entropy = jax.jit(logprob_and_entropy)(jnp.asarray(logits), jnp.asarray(target))
  for index in np.ndindex(3, 5):
    expected = oracle.logprob_and_entropy(logits[index].tolist(), int(target[index]))
    assert_allclose([logprob[index], entropy[index]], expected, rtol=1e-5, atol=1e-6)


def test_large_and_banned_logits():
  logits = jnp.array([1e4, 1e4, -jnp.inf, -1e4])
  logprob, entropy = logprob_and_entropy(logits, jnp.array(1))
  assert_allclose([logprob, entropy], [-np.log(2), np.log(2)], rtol=1e-6)
  assert logprob_and_entropy(logits, jnp.array(2))[0] == -jnp.inf
  gradient = jax.grad(lambda x: sum(logprob_and_entropy(x, jnp.array(1))))(logits)
  assert jnp.all(jnp.isfinite(gradient))


def test_bfloat16_logits_are_raised():
  logits = jnp.array([2, 1, 0, -1], jnp.bfloat16)
  logprob, entropy = logprob_and_entropy(logits, jnp.array(0))
  assert logprob.dtype == entropy.dtype == jnp.float32
  assert_allclose(entropy, 0.9475369640, atol=1e-6)


def test_vocabulary_may_be_sharded():
  mesh = jax.make_mesh((8,), ('v',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'v'))
  logits = jax.random.normal(jax.random.key(0), (4, 32))
  target = jnp.array([0, 7, 8, 31])
  got = jax.jit(logprob_and_entropy)(jax.device_put(logits, sharding), target)
  assert_allclose(got, logprob_and_entropy(logits, target), rtol=1e-5)  # order of the sum


@pytest.mark.parametrize(
  ('logits', 'target'),
  [
    (jnp.zeros((2, 4), int), jnp.zeros(2, int)),
    (jnp.zeros((2, 4)), jnp.zeros(2)),
    (jnp.zeros((2, 4)), jnp.zeros(3, int)),
  ],
  ids=['integer logits', 'target of floats', 'shorter'],
)
def test_wrong_arrays_raise(logits, target):
  with pytest.raises(TypeCheckError):
    logprob_and_entropy(logits, target)
