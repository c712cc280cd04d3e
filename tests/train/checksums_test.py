import jax.numpy as jnp
import numpy as np

from segjax.train.checksums import weight_hashes
from segjax.train.optimizer import TrainState


def hashes(params):
  state = TrainState(step=0, params=params, opt_state=None)
  return {name: int(value) for name, value in weight_hashes({'policy': state, 'kl': 1}).items()}


def test_hash_is_the_weighted_sum_of_bits():
  params = {'a': jnp.array([[1.5, -2.0, 0.25]]), 'b': jnp.array([3.0], jnp.bfloat16)}
  bits = [int(x) for x in np.array([1.5, -2.0, 0.25], np.float32).view(np.uint32)]
  first = bits[0] + 3 * bits[1] + 5 * bits[2]
  second = int(np.array(params['b']).view(np.uint16)[0])
  assert hashes(params) == {'weights/policy': (first * 31 + second) % 2**32}


def test_hash_sees_numbers_that_trade_places():
  one, other = (hashes({'w': jnp.array(w).reshape(2, 2)}) for w in ([1.0, 2, 3, 4], [1.0, 3, 2, 4]))
  assert one != other
