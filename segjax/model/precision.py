"""Which parameters stay in float32 in a network that is otherwise stored in bfloat16.

Norms, biases and the scalar head are used in float32, and are small. While it is trained, so is the
head to the vocabulary: its rounding moves every logit.
"""

from typing import Any

import jax

from segjax.model import sharding

_ALWAYS = ('scale', 'bias', 'scalar_head/kernel')
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


def cast_for_use(params: Any, dtype: str) -> Any:
  """Returns the parameters in the dtypes in which a network of this compute dtype reads them."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(stored_dtype(sharding.path_name(path), dtype)), params
  )
