"""How networks are run: the fields of a network that config.runtime sets."""

import dataclasses

from jax.sharding import Mesh

from segjax.config.settings import Runtime
from segjax.model.attention import select_implementation
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import check_heads


def apply_runtime(
  config: LlamaConfig, runtime: Runtime, mesh: Mesh, *, trained: bool
) -> tuple[LlamaConfig, str]:
  """Returns (network with the runtime's fields, reason if another attention is used, or '').

  Raises:
    UserError: its heads cannot be divided over the mesh's tensor axis.
  """
  platform = mesh.devices.flat[0].platform
  attention, reason = select_implementation(
    runtime.attention, platform, runtime.compute_dtype, config.head_dim
  )
  config = dataclasses.replace(
    config,
    dtype=runtime.compute_dtype,
    remat=runtime.remat if trained else 'none',  # nothing is saved without a backward pass
    offload=runtime.offload_activations if trained else '',
    scan_unroll=runtime.scan_unroll,
    attention=attention,
    vocab_chunk=runtime.vocab_chunk_size,
    round_logits=runtime.round_logits,
  )
  check_heads(config.num_attention_heads, config.num_key_value_heads, mesh)  # before loading
  return config, reason
