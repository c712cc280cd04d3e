"""Which activations of a layer are saved for its backward pass."""

from typing import Any

import jax
from jax.extend.core.primitives import name_p

# The primitive of jax that calls cuDNN's forward kernel. Its two outputs, of which the backward
# kernel needs both, have no names.
_CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'


def checkpoint_policy(remat: str, offload: str) -> Any:
  """Returns the policy of `jax.checkpoint`; None saves nothing.

  Args:
    remat: 'full', or names of `choices.ACTIVATIONS` to save, joined by commas. 'attention' also
      saves the sums of the softmax, so that the backward pass does not run its kernel again.
    offload: such names to save in the host's memory, or ''.
  """
  save = [] if remat == 'full' else remat.split(',')
  if not save and not offload:
    return None
  by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=save,
    names_which_can_be_offloaded=offload.split(',') if offload else [],
    offload_src='device',
    offload_dst='pinned_host',
  )

  def policy(primitive, *shapes, **parameters):
    if primitive.name == _CUDNN_FORWARD:
      primitive, parameters = name_p, {'name': 'attention'}
    return by_name(primitive, *shapes, **parameters)

  return policy
