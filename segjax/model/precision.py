"""Which parameters stay in float32 in a network that is otherwise stored in bfloat16.

Norms, biases and the scalar head are used in float32, and are small. While it is trained, so is the
head to the vocabulary: its rounding moves every logit.
"""

from typing import Any

import jax
import jax.numpy as jnp

from segjax.model import quantized, sharding

_ALWAYS = ('scale', 'bias', 'scalar_head/kernel', 'scalar_head/hidden/kernel')
_TRAINED_HEAD = {False: 'lm_head/kernel', True: 'backbone/embedding'}  # by whether it is tied


def stored_dtype(path: str, dtype: str, *, trained: bool = False, tied: bool = False) -> str:
  """Returns the dtype of the parameter at `path` in a network that is stored in `dtype`.

  Args:
    path: such as 'backbone/norm/scale'.
    dtype: of the network.
    trained: whether the network is trained, and `dtype` that of its weights between updates.
    tied: whether the embedding is the head to the vocabulary.
  """
  wide = (*_ALWAYS, _TRAINED_HEAD[tied]) if trained else _ALWAYS
  return 'float32' if dtype == 'bfloat16' and path.endswith(wide) else dtype


def cast_for_use(params: Any, dtype: str, weights_dtype: str = 'compute_dtype') -> Any:
  """Returns the parameters in the dtypes in which a network of this compute dtype reads them.

  Args:
    params: of the network.
    dtype: in which it computes.
    weights_dtype: 'int8' to read the matrices of the layers in it, see `quantized`.
  """
  if weights_dtype == 'int8':
    params = quantized.quantize_layers(params)  # of the stored weights: a cast would round twice

  def cast(path, x):
    is_int8 = x.dtype == jnp.int8
    return x if is_int8 else x.astype(stored_dtype(sharding.path_name(path), dtype))

  return jax.tree_util.tree_map_with_path(cast, params)
